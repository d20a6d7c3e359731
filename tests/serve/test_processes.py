"""The processes of models and their deaths, with sleeping shells in the places of Triton and of its stubs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.serve import processes, startup
from stillhouse.serve.control import TritonControl
from stillhouse.serve.errors import LoadHopeless, ServerFailed
from stillhouse.serve.processes import Processes, runs

# A server that starts the process of m-int4/2, and does not ask after it when it has died.
SERVER = """
import subprocess, sys, time
stub = [sys.executable, "-c", "import time; time.sleep(300)", "triton_python_backend_stub", "/r/m-int4/2/model.py", ""]
print(subprocess.Popen(stub).pid, flush=True)
time.sleep(300)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[int]:
    """The process of a model, whose server's run directory is `tmp_path`."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None
    process = int(server.stdout.readline())
    (tmp_path / "server.pid").write_text(f"{server.pid}\n")
    yield process
    os.kill(process, signal.SIGKILL)
    server.kill()
    server.wait()
    server.stdout.close()


def test_a_process_that_dies_is_known_by_its_version_and_whether_it_had_loaded_it(
    tmp_path: Path, stub: int, wait_until: Callable[..., float]
) -> None:
    seen = Processes(tmp_path)
    assert seen.dead() == []
    os.kill(stub, signal.SIGKILL)
    wait_until(seen.dead)
    (dead,) = seen.dead()
    assert (dead.model, dead.version, seen.has_loaded(dead)) == ("m-int4", 2, False)
    assert seen.loaded_versions("m-int4") == set()
    (tmp_path / f"under-way-{stub}").touch()
    assert seen.has_loaded(dead)
    assert seen.loaded_versions("m-int4") == {2}
    seen.settle(dead)
    assert (seen.dead(), seen.loaded_versions("m-int4")) == ([], set())


def test_one_that_the_kernels_list_lacks_for_a_moment_is_not_forgotten(
    tmp_path: Path, stub: int, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., float]
) -> None:
    seen = Processes(tmp_path)
    assert seen.dead() == []
    (tmp_path / f"under-way-{stub}").touch()
    os.kill(stub, signal.SIGKILL)
    with monkeypatch.context() as lacking:
        whole = Path.read_text
        lacking.setattr(Path, "read_text", lambda path, **_: "" if path.name == "children" else whole(path))
        wait_until(seen.dead)
    assert [(dead.model, dead.version) for dead in seen.dead()] == [("m-int4", 2)]


def test_one_that_triton_ends_while_it_loads_may_be_asked_after_late(
    tmp_path: Path, stub: int, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., float]
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    seen = Processes(tmp_path)
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: not runs(stub))
    assert seen.dead() == []
    now_s[0] += 1.0
    assert seen.dead() == []
    (tmp_path / f"under-way-{stub}").touch()
    assert [dead.pid for dead in seen.dead()] == [stub], "it had loaded: Triton asks after that at once"
    (tmp_path / f"under-way-{stub}").unlink()
    now_s[0] += 3.0
    assert [dead.pid for dead in seen.dead()] == [stub]


def test_one_that_died_before_it_was_seen_is_told_without_its_name(
    tmp_path: Path, stub: int, wait_until: Callable[..., float]
) -> None:
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{stub}/cmdline").read_bytes())
    seen = Processes(tmp_path)
    wait_until(seen.dead)
    assert [dead.model for dead in seen.dead()] == [""]


def test_a_start_whose_model_dies_while_it_loads_ends_by_name(
    tmp_path: Path, stub: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Any = SimpleNamespace(
        processes=Processes(tmp_path),
        run_directory=tmp_path,
        log_file=tmp_path / "log",
        http_url="http://127.0.0.1:9",
        exit_status=lambda: None,
    )

    def says_ready(_: str) -> bool:  # and at the first time, the process is killed
        asked.append(1)
        if len(asked) == 2:
            os.kill(stub, signal.SIGKILL)
        return False

    asked = list[int]()
    monkeypatch.setattr(startup, "_says_ready", says_ready)
    with pytest.raises(ServerFailed, match="m-int4/2 cannot be loaded: its process died, or was killed") as told:
        startup.wait_until_ready(server, 60, threading.Event())
    assert told.value.model == "m-int4"


def test_a_load_that_never_ends_is_not_waited_for() -> None:
    over = threading.Event()
    control = TritonControl("grpc://127.0.0.1:9")
    stuck: Any = SimpleNamespace(load_model=lambda *_, **__: over.wait(60), close=lambda: None)
    control._triton = stuck
    with pytest.raises(LoadHopeless, match="its process has died"):
        control.load("m-int4", lambda: "its process has died")
    over.set()
    control.close()
