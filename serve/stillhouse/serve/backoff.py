"""How long a repair waits for the one before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 30.0
_SOUND_AFTER_S = 10.0


class Backoff:
    """How long to wait before a repair: not at all, unless the one before did not help; then longer each time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._sound_at_s = -math.inf
        self._wait_s = 0.0

    def next_s(self) -> float:
        """0; 1, 2, 4 … at most 30 s where the repair before is not over, or has been for less than 10 s."""
        again = self._clock_s() < self._sound_at_s
        self._wait_s = min(_LONGEST_WAIT_S, max(1.0, 2 * self._wait_s)) if again else 0.0
        self._sound_at_s = math.inf
        if self._wait_s:
            log.warning("it is not long since the last repair: the next is in %g s", self._wait_s)
        return self._wait_s

    def over(self) -> None:
        """All answers again."""
        self._sound_at_s = self._clock_s() + _SOUND_AFTER_S
