"""What the thread that asks does with what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.engine.errors import EngineClosed
from stillhouse.serve.ending import Ending
from stillhouse.serve.watch import Watcher, longest_unasked


class Request:
    def __init__(self, *, holds_slot: bool = True) -> None:
        self.cancelled = threading.Event()
        self.asked = 0
        self.holds_slot = holds_slot
        self.times = 0

    def is_abandoned(self) -> bool:
        self.times += 1
        return self.times >= 3

    def cancel(self) -> None:
        self.cancelled.set()

    def cut(self, reason: EngineClosed) -> None:
        raise AssertionError(reason)


class Lasting(Request):
    """One whose client stays."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[EngineClosed] = []

    def is_abandoned(self) -> bool:
        return False

    def cut(self, reason: EngineClosed) -> None:
        self.reasons.append(reason)


class Failing(Lasting):
    """One of which the server cannot say whether its client is there."""

    def is_abandoned(self) -> bool:
        raise RuntimeError("no such sender")


def test_a_request_is_cancelled_once_its_client_has_gone() -> None:
    request, ended = Request(), threading.Event()
    watcher = Watcher(lambda: False, Ending(None), ended.set)
    watcher.add(request)
    assert request.cancelled.wait(5)
    watcher.close()
    assert request.times == 3
    assert not ended.is_set()


def test_an_engine_that_has_failed_ends_its_process() -> None:
    failed, ended = threading.Event(), threading.Event()
    watcher = Watcher(failed.is_set, Ending(None), ended.set)
    assert not ended.wait(0.2)
    failed.set()
    assert ended.wait(5)
    watcher.close()


def test_one_that_cannot_be_asked_keeps_no_other_from_being_cancelled_nor_the_process_from_its_end(
    wait_until: Callable[..., float],
) -> None:
    failing, other, failed, ended = Failing(), Request(), threading.Event(), threading.Event()
    watcher = Watcher(failed.is_set, Ending(None), ended.set)
    watcher.add(failing)
    wait_until(lambda: failing.asked)
    watcher.add(other)
    assert other.cancelled.wait(5)
    assert not failing.cancelled.is_set()
    failed.set()
    assert ended.wait(5)
    watcher.close()


def test_a_server_that_ends_refuses_at_once_and_cuts_after_the_grace_time(
    tmp_path: Path, wait_until: Callable[..., float]
) -> None:
    file, request = tmp_path / "drain", Lasting()
    ending = Ending(file)
    watcher = Watcher(lambda: False, ending)
    watcher.add(request)
    assert ending.refusal is None
    file.write_text(f"{time.monotonic() + 1.5}\n")
    wait_until(lambda: ending.refusal is not None)
    assert "shutting down" in str(ending.refusal)
    assert not request.reasons
    wait_until(lambda: request.reasons)
    assert time.monotonic() >= float(file.read_text())
    assert "grace time is over" in str(request.reasons[0])
    watcher.close()


@pytest.mark.parametrize("slots", [16, 32, 33, 256])
def test_however_many_wait_and_run_those_that_hold_a_slot_are_asked_every_fourth_time(slots: int) -> None:
    waiting, running = [Request(holds_slot=False) for _ in range(1000)], [Request() for _ in range(slots)]
    rounds = 16
    for number in range(1, rounds + 1):
        for request in longest_unasked([*waiting, *running]):
            request.asked = number
            request.is_abandoned()
    assert min(request.times for request in running) >= 4
    assert sum(request.times for request in running) <= rounds * -(-slots // 4)
    assert sum(request.times for request in waiting) == 2 * rounds
