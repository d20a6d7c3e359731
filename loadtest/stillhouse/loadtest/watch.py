"""What makes a run worthless, watched while it runs: a load generator that is too slow, a server that is gone.

A user's clock is only as good as the event loop that reads it. Its lag (how much later than asked a sleeping greenlet
wakes) and the processor time of its thread are measured all the time.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.loadtest.histogram import Latencies
from stillhouse.loadtest.samples import CUT, OK, Sample

_NAP_S = 0.02
LAG_LIMIT_MS = 20.0  # at the 95th percentile
LOOP_CPU_LIMIT = 0.9  # of one core
GONE_AFTER_S = 3.0
_DEAD = ("ConnectionFailed", "StreamBroken", "Unavailable")


@dataclass(frozen=True)
class ClientState:
    """How busy one process of the load generator was."""

    lag_p95_ms: float
    lag_max_ms: float
    loop_cpu: float  # share of one core that the event loop's thread used
    process_cpu: float  # cores that all threads of the process used

    def problems(self) -> list[str]:
        found = []
        if self.loop_cpu > LOOP_CPU_LIMIT:
            found.append(f"its event loop used {100 * self.loop_cpu:.0f} % of a core")
        if self.lag_p95_ms > LAG_LIMIT_MS:
            found.append(f"its event loop was {self.lag_p95_ms:.0f} ms late at the 95th percentile")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LoopWatch:
    """Measures this process's event loop from `restart` on; `run` is a greenlet of its own."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._lag = Latencies()
        self._begun = time.perf_counter(), time.thread_time(), time.process_time()

    def run(self) -> None:
        while True:
            due = time.perf_counter() + _NAP_S
            time.sleep(_NAP_S)  # gevent's
            self._lag.add(max(0.0, time.perf_counter() - due))

    def state(self) -> ClientState:
        """To be called in the event loop's thread."""
        spread = self._lag.spread()
        wall_s, loop_s, process_s = self._begun
        passed_s = max(time.perf_counter() - wall_s, 1e-9)
        loop_cpu, process_cpu = (time.thread_time() - loop_s) / passed_s, (time.process_time() - process_s) / passed_s
        lag = (spread.p95_ms, spread.max_ms) if len(self._lag) else (0.0, 0.0)
        return ClientState(*lag, loop_cpu, process_cpu)


class ServerWatch:
    """Suspects that the server is gone when for some seconds nothing but broken connections came back."""

    def __init__(self) -> None:
        self._failing_since: float | None = None

    def note(self, sample: Sample) -> None:
        if sample.outcome == CUT:
            return
        if sample.outcome == OK or sample.outcome not in _DEAD:
            self._failing_since = None
        elif self._failing_since is None:
            self._failing_since = time.monotonic()

    def suspects(self) -> bool:
        return self._failing_since is not None and time.monotonic() - self._failing_since > GONE_AFTER_S


def validity(states: list[ClientState], late_p95_ms: float) -> list[str]:
    """Why the figures cannot be believed; empty where they can."""
    found = [problem for state in states for problem in state.problems()]
    if late_p95_ms > LAG_LIMIT_MS:
        found.append(f"it sent {late_p95_ms:.0f} ms later than planned at the 95th percentile")
    return list(dict.fromkeys(found))
