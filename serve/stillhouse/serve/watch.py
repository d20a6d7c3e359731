"""What only asking tells: clients that have gone away, an engine that has failed, a server that ends or has died."""

from __future__ import annotations

import itertools
import logging
import math
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from stillhouse.engine.errors import EngineClosed
from stillhouse.serve.ending import Ending

log = logging.getLogger(__name__)

_EVERY_S = 0.025
# To ask costs a tenth of a millisecond of a core. Of those that hold a slot so many are asked at a time that each is
# asked within a tenth of a second, and few of those that only wait.
_RUNNING_AT_A_TIME = 4  # at least
_LOOKS_A_ROUND = 4
_WAITING_AT_A_TIME = 2
_LAST_WORDS_S = 1.0


class Watched(Protocol):
    """A request under way; `asked` is the watcher's, the number of the round in which it was last asked."""

    asked: int

    @property
    def holds_slot(self) -> bool: ...

    def is_abandoned(self) -> bool:
        """Whether the client has gone; asks the server, which takes a fraction of a millisecond."""
        ...

    def cancel(self) -> None: ...

    def cut(self, reason: EngineClosed) -> None: ...


class Watcher:
    """Cancels requests whose client has gone, whether they wait, prefill or decode.

    When the server ends, it cuts those that are left at the end of the grace time (see ending.py). Once `failed` says
    so, it ends the process: an engine that has failed never answers again, and a process that has died is what the
    launcher repairs.
    """

    def __init__(
        self, failed: Callable[[], bool], ending: Ending, end_process: Callable[[], object] = lambda: os._exit(1)
    ) -> None:
        self._failed = failed
        self._ending = ending
        self._end_process = end_process
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
        for number in itertools.count(1):
            if self._closing.wait(_EVERY_S):
                return
            try:
                self._ending.look()
                self._look_after(number, self._ending.cut)
            except Exception:  # the boundary of a thread that must not end: the next in turn are asked all the same
                log.exception("looking after the requests failed")
            if self._failed():
                # Time for the errors to be sent that the engine has handed out.
                self._closing.wait(_LAST_WORDS_S)
                log.critical("the engine has failed: this process ends, to be started again")
                self._end_process()
                return

    def _look_after(self, number: int, cut: EngineClosed | None) -> None:
        # A function of its own: its frame ends, and with it the last hold on requests that are done.
        requests = list(self._watched.values())
        if cut is not None:
            for request in requests:
                request.cut(cut)
        for request in longest_unasked(requests):
            request.asked = number
            if request.is_abandoned():
                self.remove(request)
                request.cancel()


def longest_unasked(requests: Sequence[Watched]) -> list[Watched]:
    """Whose turn it is to be asked."""
    running, waiting = list[Watched](), list[Watched]()
    for request in sorted(requests, key=lambda request: request.asked):
        (running if request.holds_slot else waiting).append(request)
    count = max(_RUNNING_AT_A_TIME, math.ceil(len(running) / _LOOKS_A_ROUND))
    return running[:count] + waiting[:_WAITING_AT_A_TIME]


_FOLLOW_SERVER = """
while kill -0 "$1" && kill -0 "$2"; do sleep 0.5; done 2>/dev/null
read -r _ _ _ parent _ < /proc/$$/stat
if [ "$parent" = "$2" ]; then kill -9 "$2"; fi
"""


def end_with_server() -> None:
    """Ends this process when the server is gone.

    A model's process outlives a killed server when it is busy: a thread of it then waits for ever for the server's
    answer, with Python's lock in its hand. So no thread of ours can see to it, and a shell beside it does; the shell
    asks for its own parent before it kills, since a number may by then be another process's.
    """
    command = ["/bin/sh", "-c", _FOLLOW_SERVER, "stillhouse-follow", str(os.getppid()), str(os.getpid())]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
