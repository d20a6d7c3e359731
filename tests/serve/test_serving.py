"""What `stillhouse serve` goes on looking after while a repair is put off; Triton and its models are stood in for."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.gateway.gateway import Access
from stillhouse.serve import serving
from stillhouse.serve.errors import ServeError
from stillhouse.serve.launcher import ServeOptions
from stillhouse.serve.supervisor import Backoff


class Triton:
    """A server whose looks follow a script: at each, the models that are dead, or the status it has ended with."""

    log_file = Path("triton.log")

    def __init__(self, looks: Iterator[list[str] | int]) -> None:
        self.looks = looks
        self.dead: list[str] = []

    def exit_status(self) -> int | None:
        look = next(self.looks)
        if isinstance(look, int):
            return look
        self.dead = look
        return None

    def dead_models(self) -> list[str]:
        return self.dead


class Gateway:
    url = "http://127.0.0.1:9000/v1"

    def drain(self, grace_s: float, *, hurry: threading.Event | None = None) -> None:
        """It ends at once."""


class Generator:
    def __init__(self) -> None:
        self.failed: list[str] = []

    def fail(self, name: str, reason: str) -> None:
        assert reason == "its process has died"
        self.failed.append(name)

    def suspect(self, name: str) -> None:
        raise AssertionError(f"{name} has not come back")

    def rest(self) -> None: ...


Serve = Callable[[list[list[str] | int]], tuple[list[str], list[list[str]]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serves until the script's status; the models whose streams were ended, and what each repair was asked for."""

    def run(looks: list[list[str] | int]) -> tuple[list[str], list[list[str]]]:
        triton, generator, repairs = Triton(iter(looks)), Generator(), list[list[str]]()

        def repair(server: Any, _: Any, models: list[str], *, stop: Any) -> tuple[Any, list[str]]:
            assert not stop.is_set()
            repairs.append(models)
            return server, models  # they do not come back

        monkeypatch.setattr(serving, "_LOOK_S", 0.0)
        monkeypatch.setattr(serving, "start_gateway", lambda *_: Gateway())
        monkeypatch.setattr(serving, "start_server", lambda *_, **__: triton)
        monkeypatch.setattr(serving, "plug_triton", lambda *_: generator)
        monkeypatch.setattr(serving, "Processes", lambda server: server)
        monkeypatch.setattr(serving, "repair", repair)
        with pytest.raises(ServeError, match="ended by itself with status 137"):
            serving.serve(ServeOptions(Path("nowhere"), access=Access()), lambda _: None)
        return generator.failed, repairs

    return run


def test_while_a_repair_is_put_off_another_models_death_and_the_servers_end_are_seen(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter([0.0, 3600.0])
    monkeypatch.setattr(Backoff, "next_s", lambda _: next(waits))
    # Dead, repaired in vain, put off for an hour; then the other one dies, then Triton.
    failed, repairs = serve([["a"], ["a"], ["a"], ["a", "b"], ["a", "b"], 137])
    assert repairs == [["a"]]
    assert failed == ["a", "a", "b"], "each is told of when it is first seen, and not at every look"


def test_what_has_died_meanwhile_is_repaired_with_the_one_that_was_put_off(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = iter([0.0, 5.0, 3600.0])
    now_s = iter(range(100))
    monkeypatch.setattr(Backoff, "next_s", lambda _: next(waits))
    monkeypatch.setattr(serving, "time", types.SimpleNamespace(monotonic=lambda: float(next(now_s))))
    _, repairs = serve([["a"], ["a"], ["a", "b"], *([["a", "b"]] * 5), 137])
    assert repairs == [["a"], ["a", "b"]]


class Draining(Triton):
    """One that is told to end at the first look."""

    hurried = False

    def exit_status(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def drain(self) -> None: ...

    def stop(self) -> None: ...

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


def test_a_second_signal_ends_the_gateways_grace_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, gateway, generator = Draining(iter(())), Held(), Generator()
    monkeypatch.setattr(serving, "_LOOK_S", 0.0)
    monkeypatch.setattr(serving, "start_gateway", lambda *_: gateway)
    monkeypatch.setattr(serving, "start_server", lambda *_, **__: triton)
    monkeypatch.setattr(serving, "plug_triton", lambda *_: generator)
    monkeypatch.setattr(serving, "Processes", lambda server: server)
    assert serving.serve(ServeOptions(Path("nowhere"), access=Access()), lambda _: None) == 0
    assert gateway.waited
    assert triton.hurried
