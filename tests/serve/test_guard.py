"""The guard and what it leaves: run with plain processes in Triton's place."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillhouse.serve import guard, leftovers

# A server with a child of its own, as Triton has its models' processes; both would run on for minutes.
SERVER = ["sh", "-c", 'sleep 301 & echo "$!" > "$0/child.pid"; wait', "RUN"]
STUBBORN = ["sh", "-c", 'trap "" TERM; echo "$$" > "$0/child.pid"; while :; do sleep 0.1; done', "RUN"]


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


@pytest.fixture
def shm_file() -> Iterator[Path]:
    file = guard.SHARED_MEMORY / f"stillhouse_test{secrets.token_hex(6)}_region"
    file.write_bytes(b"x")
    yield file
    file.unlink(missing_ok=True)


def start(run_directory: Path, shm_file: Path, command: list[str], grace_s: float = 5.0) -> subprocess.Popen[bytes]:
    """The guard over `command`, once the command runs; the last word of it becomes the run directory."""
    prefix = shm_file.name.removesuffix("region")
    settings = [str(run_directory), prefix, str(grace_s)]
    process = subprocess.Popen(
        [sys.executable, "-I", guard.__file__, *settings, "--", *command[:-1], str(run_directory)],
        stdin=subprocess.PIPE,
    )
    wait_for(lambda: all(written(run_directory / name) for name in ("server.pid", "child.pid")))
    return process


def wait_for(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.02)


def written(file: Path) -> bool:
    return file.is_file() and bool(file.read_text().strip())


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def pids(run_directory: Path) -> list[int]:
    return [int((run_directory / name).read_text()) for name in ("server.pid", "child.pid")]


@pytest.mark.parametrize("how", ["stop", "pipe closed", "SIGTERM"])
def test_the_server_ends_and_nothing_is_left(run_directory: Path, shm_file: Path, how: str) -> None:
    process = start(run_directory, shm_file, SERVER)
    started = pids(run_directory)
    assert process.stdin is not None
    if how == "stop":
        process.stdin.write(b"stop\n")
        process.stdin.flush()
    elif how == "pipe closed":
        process.stdin.close()
    else:
        process.terminate()
    process.wait(10)
    assert not any(map(alive, started))
    assert not shm_file.exists()
    assert not run_directory.exists()


def test_a_server_that_does_not_end_is_killed_after_the_grace_time(run_directory: Path, shm_file: Path) -> None:
    process = start(run_directory, shm_file, STUBBORN, grace_s=0.5)
    assert process.stdin is not None
    begun = time.monotonic()
    process.stdin.close()
    wait_for((run_directory / "drain").is_file)
    cut_at = float((run_directory / "drain").read_text())
    assert cut_at >= begun + 0.5
    assert process.wait(10) == 128 + signal.SIGKILL
    assert time.monotonic() > cut_at


def test_the_server_is_not_asked_to_end_while_a_model_has_requests_under_way(
    run_directory: Path, shm_file: Path
) -> None:
    process = start(run_directory, shm_file, SERVER, grace_s=60)
    assert process.stdin is not None
    busy = run_directory / "under-way-1"
    busy.write_bytes(b"\x01" + bytes(7))
    process.stdin.close()
    wait_for((run_directory / "drain").is_file)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    busy.write_bytes(bytes(8))
    assert process.wait(10) == 128 + signal.SIGTERM


def test_kill_does_not_wait_for_the_grace_time(run_directory: Path, shm_file: Path) -> None:
    process = start(run_directory, shm_file, STUBBORN, grace_s=60)
    assert process.stdin is not None
    process.stdin.write(b"stop\nkill\n")
    process.stdin.flush()
    assert process.wait(5) == 128 + signal.SIGKILL


def test_a_server_with_a_load_that_never_ends_is_not_waited_for_once_nothing_is_under_way(
    run_directory: Path, shm_file: Path
) -> None:
    process = start(run_directory, shm_file, STUBBORN, grace_s=60)
    assert process.stdin is not None
    process.stdin.write(b"stuck\nstop\n")
    process.stdin.flush()
    assert process.wait(10) == 128 + signal.SIGKILL


def test_the_server_dies_with_the_guard(run_directory: Path, shm_file: Path) -> None:
    process = start(run_directory, shm_file, SERVER)
    server, child = pids(run_directory)
    process.kill()
    process.wait(5)
    wait_for(lambda: not alive(server))
    os.kill(child, signal.SIGKILL)


def test_the_servers_own_end_is_the_guards_status(run_directory: Path, shm_file: Path) -> None:
    process = start(run_directory, shm_file, ["sh", "-c", 'echo 1 > "$0/child.pid"; sleep 0.3; exit 7', "RUN"])
    assert process.wait(5) == 7


def test_leftovers_of_a_dead_run_are_removed_and_a_living_run_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    living, living_lock = leftovers.new_run_directory()
    dead, dead_lock = leftovers.new_run_directory()
    os.close(dead_lock)
    stub = subprocess.Popen(["sh", "-c", "sleep 301; :", str(dead / "backends" / "stub")])
    wait_for(lambda: b"stub" in Path(f"/proc/{stub.pid}/cmdline").read_bytes())
    files = [guard.SHARED_MEMORY / f"{leftovers.shm_prefix(run)}1" for run in (living, dead)]
    for file in files:
        file.write_bytes(b"x")
    try:
        assert leftovers.remove_leftovers() == [dead]
        assert stub.wait(5) == -signal.SIGKILL
        assert [file.exists() for file in files] == [True, False]
        assert living.is_dir()
        assert not dead.exists()
    finally:
        files[0].unlink()
        os.close(living_lock)


@pytest.mark.parametrize("launcher", ["killed", "draining", "serving"])
def test_a_run_that_ends_is_known_by_its_ports_and_ended_at_once_where_its_launcher_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shm_file: Path, launcher: str
) -> None:
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    run, lock = leftovers.new_run_directory()
    if launcher == "killed":
        (run / "launcher.pid").write_text("1")  # it is not the guard's parent
    process = start(run, shm_file, ["sh", "-c", f"{STUBBORN[2]} # --grpc-port=4801", "RUN"], grace_s=60)
    if launcher != "serving":
        assert process.stdin is not None
        process.stdin.close()
        wait_for((run / "drain").is_file)
    assert not leftovers.is_ending([4802])
    assert leftovers.is_ending([4801, 4802]) == (launcher != "serving")
    if launcher == "killed":
        assert process.wait(10) == 128 + signal.SIGKILL
    else:
        assert process.poll() is None
        process.kill()
        process.wait(10)
    os.close(lock)


def test_run_directories_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers.tempfile, "gettempdir", lambda: str(tmp_path))
    run, lock = leftovers.new_run_directory()
    os.close(lock)
    assert run.stat().st_mode & 0o077 == 0
    assert run.parent.stat().st_mode & 0o077 == 0


def test_the_servers_threads_have_room_for_deep_json(run_directory: Path, shm_file: Path) -> None:
    told = ["sh", "-c", 'ulimit -s > "$0/stack"; echo "$$" > "$0/child.pid"; sleep 301', "RUN"]
    process = start(run_directory, shm_file, told)
    assert int((run_directory / "stack").read_text()) * 1024 == guard._STACK_BYTES
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 128 + signal.SIGTERM
