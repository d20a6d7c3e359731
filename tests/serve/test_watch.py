"""What the thread that asks does with what it is told."""

from __future__ import annotations

import threading

from stillhouse.serve.watch import Watcher


class Request:
    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.asked = 0

    def is_abandoned(self) -> bool:
        self.asked += 1
        return self.asked >= 3

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_request_is_cancelled_once_its_client_has_gone() -> None:
    request, ended = Request(), threading.Event()
    watcher = Watcher(lambda: False, ended.set)
    watcher.add(request)
    assert request.cancelled.wait(5)
    watcher.close()
    assert request.asked == 3
    assert not ended.is_set()


def test_an_engine_that_has_failed_ends_its_process() -> None:
    failed, ended = threading.Event(), threading.Event()
    watcher = Watcher(failed.is_set, ended.set)
    assert not ended.wait(0.2)
    failed.set()
    assert ended.wait(5)
    watcher.close()
