"""Two threads that look after what only asking tells: clients that have gone away, and a server that has died."""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol

log = logging.getLogger(__name__)

_EVERY_S = 0.025
_PARENT_EVERY_S = 0.25


class Watched(Protocol):
    """A request under way."""

    def is_abandoned(self) -> bool:
        """Whether the client has gone; asks the server, which takes a fraction of a millisecond."""
        ...

    def cancel(self) -> None: ...


class Watcher:
    """Cancels requests whose client has gone, within 50 ms, whether they wait, prefill or decode."""

    def __init__(self) -> None:
        self._watched: dict[int, Watched] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="stillhouse-watch", daemon=True)
        self._thread.start()

    def add(self, request: Watched) -> None:
        self._watched[id(request)] = request

    def remove(self, request: Watched) -> None:
        self._watched.pop(id(request), None)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self._look_after(list(self._watched.values()))

    def _look_after(self, requests: list[Watched]) -> None:
        # A function of its own: its frame ends, and with it the last hold on requests that are done.
        for request in requests:
            if request.is_abandoned():
                self.remove(request)
                request.cancel()


def end_with_server() -> None:
    """Ends this process when the server is gone.

    A model's process outlives a killed server when it is busy, and its other threads then wait for ever for the
    server's answers: so this is a thread of its own, which asks nobody but the kernel.
    """
    threading.Thread(target=_follow_parent, args=(os.getppid(),), name="stillhouse-parent", daemon=True).start()


def _follow_parent(parent: int) -> None:
    forever = threading.Event()
    while not forever.wait(_PARENT_EVERY_S):
        if os.getppid() != parent:
            log.error("the Triton server has gone: this model's process ends")
            os._exit(1)
