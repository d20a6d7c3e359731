"""One thread that looks after what only asking tells: clients that went away, and a server that died."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

_EVERY_S = 0.025


class Watched(Protocol):
    """A request under way."""

    def is_abandoned(self) -> bool:
        """Whether the client has gone; asks the server, which takes a fraction of a millisecond."""
        ...

    def cancel(self) -> None: ...


class Watcher:
    """Cancels requests whose client has gone, within 50 ms, whether they wait, prefill or decode.

    A model's process outlives a killed server when it is busy; seen from inside, its parent changes. Then it ends.
    """

    def __init__(self, on_server_gone: Callable[[], None]) -> None:
        self._on_server_gone = on_server_gone
        self._parent = os.getppid()
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
            if os.getppid() != self._parent:
                self._on_server_gone()
            self._look_after(list(self._watched.values()))

    def _look_after(self, requests: list[Watched]) -> None:
        # A function of its own: its frame ends, and with it the last hold on requests that are done.
        for request in requests:
            if request.is_abandoned():
                self.remove(request)
                request.cancel()
