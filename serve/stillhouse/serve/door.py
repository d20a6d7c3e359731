"""The way into the engine: here templates are rendered and prompts tokenized, on threads."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from stillhouse.engine.errors import EngineClosed, StillhouseError

if TYPE_CHECKING:
    from stillhouse.engine.core import Engine, Stats
    from stillhouse.serve.answering import Answering

log = logging.getLogger(__name__)

_THREADS = 2


class Door:
    """Counts what is inside as waiting, so that the engine's limit of those bounds both."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="stillhouse-door")
        self._inside = 0  # in answers
        self._lock = threading.Lock()

    def stats(self) -> Stats:
        """The engine's, what is inside counted."""
        stats = self._engine.stats()
        return replace(stats, waiting=stats.waiting + self._inside)

    def check_room(self) -> None:
        """Raises QueueFull or EngineClosed where whoever comes now would meet it in the engine."""
        self._engine.check_room(self._inside)

    def take(self, answering: Answering) -> None:
        """Has `answering` begin when its turn comes; returns at once."""
        self._count(answering.num_answers)
        try:
            self._threads.submit(self._lead_through, answering)
        except RuntimeError as error:  # closed, or no thread can be started
            self._count(-answering.num_answers)
            answering.fail(EngineClosed(f"no request can be taken in: {error}"))

    def close(self) -> None:
        """Waits for what is inside."""
        self._threads.shutdown()

    def _lead_through(self, answering: Answering) -> None:
        try:
            answering.begin()
        except StillhouseError as error:
            answering.fail(error)
        except Exception as error:  # the boundary: a client must never wait for an answer that cannot come
            log.exception("a request failed before it was submitted")
            answering.fail(StillhouseError(f"{type(error).__name__}: {error}"))
        finally:
            self._count(-answering.num_answers)

    def _count(self, change: int) -> None:
        with self._lock:
            self._inside += change
