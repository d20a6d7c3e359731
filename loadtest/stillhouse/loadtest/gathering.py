"""Who takes part in a test: a number for every user over all its processes, and one zero of the clock for all.

Kept by the master, or by the only process. The dispatchers of an open loop wait for one another, or the plan's first
seconds would lack the share of those whose process comes up late; when all are at their plan's end, the test is over.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import gevent

GATHER_S = 10.0  # the longest that the first waits for the last: there may be fewer than were asked for

Answer = Callable[[int, int, float], None]


class Gathering:
    """The users of one test after another."""

    def __init__(self) -> None:
        self._patience: gevent.Greenlet | None = None
        self.restart(0, 0.0, lambda: None)

    def restart(self, expected: int, lead_s: float, ended: Callable[[], None]) -> None:
        """A new test of `expected` dispatchers (0: a closed loop, in which nobody waits).

        Its zero is `lead_s` after the last has come: what its answer needs to be there. `ended` is called when so many
        are at the end of their plans.
        """
        if self._patience is not None:
            self._patience.kill()
        self._patience = None
        self._expected, self._lead_s, self._ended = expected, lead_s, ended
        self._numbers = itertools.count()
        self._begun: tuple[int, float] | None = None  # shares, and the zero
        self._waiting: list[tuple[int, Answer]] = []
        self._at_end = 0

    def come(self, answer: Answer) -> None:
        """One more user; `answer` gets its number, in how many shares the plan goes, and the zero (of time.time).

        Now, or when the last has come. Whose number is not below the shares came later and has none.
        """
        number = next(self._numbers)
        if self._begun is not None:
            answer(number, *self._begun)
            return
        self._waiting.append((number, answer))
        if len(self._waiting) >= self._expected:
            self._begin()
        elif self._patience is None:
            self._patience = gevent.spawn_later(GATHER_S, self._begin)

    @property
    def zero_s(self) -> float | None:
        """When the plan's time is 0, of time.time; None before it is known."""
        return None if self._begun is None else self._begun[1]

    def come_to_end(self) -> None:
        """One dispatcher has sent all of its share, and has its answers."""
        self._at_end += 1
        if self._begun is not None and self._at_end == self._begun[0]:
            self._ended()

    def _begin(self) -> None:
        if self._begun is not None:
            return  # the last came before the patience was at its end
        waiting, self._waiting = self._waiting, []
        self._begun = len(waiting), time.time() + self._lead_s
        for number, answer in waiting:
            answer(number, *self._begun)
