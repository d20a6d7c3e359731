"""How `stillhouse serve` ends; Triton and its models are stood in for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.gateway.gateway import Access
from stillhouse.serve import restart, serving
from stillhouse.serve.errors import ServeError
from stillhouse.serve.launcher import ServeOptions
from stillhouse.serve.processes import Processes


class Triton:
    """A server that is told to end, or has ended, at a look."""

    log_file = Path("triton.log")
    ports = None
    models = (SimpleNamespace(name="m"),)

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self.processes = Processes(run_directory)

    def exit_status(self) -> int | None:
        return 137

    def stop(self, *, at_once: bool = False) -> None: ...


class Gateway:
    url = "http://127.0.0.1:9000/v1"

    def drain(self, grace_s: float, *, hurry: threading.Event | None = None) -> None:
        """It ends at once."""


class Generator:
    def rest(self) -> None: ...

    def suspect(self, name: str) -> None: ...


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Any], None]:
    def put(triton: Any, gateway: Any) -> None:
        monkeypatch.setattr(serving, "_LOOK_S", 0.0)
        monkeypatch.setattr(serving, "start_gateway", lambda *_: gateway)
        monkeypatch.setattr(serving, "start_server", lambda *_, **__: triton)
        monkeypatch.setattr(serving, "plug_triton", lambda *_: Generator())

    return put


def test_a_server_that_has_ended_and_does_not_come_up_again_is_an_error(
    stand_ins: Callable[[Any, Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_server(*_: object, **__: object) -> None:
        raise ServeError("port 8000 is in use")

    stand_ins(Triton(tmp_path), Gateway())
    monkeypatch.setattr(restart, "start_server", start_server)
    with pytest.raises(ServeError, match="port 8000 is in use"):
        serving.serve(ServeOptions(tmp_path, access=Access()), lambda _: None)


class Draining(Triton):
    """One that is told to end at the first look."""

    hurried = False

    def exit_status(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def drain(self, *, stuck: bool) -> None: ...

    def hurry(self) -> None:
        self.hurried = True


class Held(Gateway):
    """One with a request that does not end; a second Ctrl-C comes meanwhile."""

    waited = False

    def refuse(self) -> None: ...

    def drain(self, grace_s: float, *, hurry: threading.Event | None = None) -> None:
        if grace_s:
            assert hurry is not None
            assert not hurry.is_set()
            signal.raise_signal(signal.SIGINT)
            self.waited = hurry.wait(5)


def test_a_second_signal_ends_the_gateways_grace_time_too(
    stand_ins: Callable[[Any, Any], None], tmp_path: Path
) -> None:
    triton, gateway = Draining(tmp_path), Held()
    stand_ins(triton, gateway)
    assert serving.serve(ServeOptions(Path("nowhere"), access=Access()), lambda _: None) == 0
    assert gateway.waited
    assert triton.hurried
