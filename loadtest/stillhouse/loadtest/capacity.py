"""The highest rate of requests at which a server still keeps an objective, found by search.

The rate is doubled until the objective is missed (or halved until it is met), then the gap between the highest rate
that met it and the lowest that missed it is halved on a logarithmic scale until they are 10 % apart (quickly: 25 %).
The end point is repeated; where a repeat misses, it is lowered by as much and repeated again. Every probe is an open
loop with Poisson arrivals: a closed loop would slow down with the server and hide that it is too slow.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.loadtest.errors import BadInput, Missed, RunFailed
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.report import align, number
from stillhouse.loadtest.run import LoadResult, run_locust
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.tally import without_nan

_LOWEST = 0.05  # requests a second
_LOWER = "look at the figures of a single user (loadtest run --users 1), or begin with a lower --start"


@dataclass(frozen=True)
class Effort:
    """How closely a capacity is looked for."""

    precision: float  # the search ends when the rates on both sides are this close
    repeats: int  # of the end point
    least_requests: int  # of a probe, or its 95th percentile says nothing


THOROUGH, QUICK = Effort(1.1, 2, 40), Effort(1.25, 1, 25)


@dataclass(frozen=True)
class Capacity:
    """The end point of a search, and everything that was tried on the way."""

    rate: float  # requests a second; NaN where the search came to no end
    goodput_per_s: float  # the median of the repeats there
    tokens_per_s: float
    repeats: tuple[LoadResult, ...]
    probes: tuple[LoadResult, ...]  # in the order they were made

    @classmethod
    def without_end(cls, probes: Sequence[LoadResult]) -> Capacity:
        """What an error or an interrupt has left of a search."""
        return cls(math.nan, math.nan, math.nan, (), tuple(probes))

    def to_json(self) -> dict[str, Any]:
        figures = {"rate": self.rate, "goodput_per_s": self.goodput_per_s, "tokens_per_s": self.tokens_per_s}
        return {
            **without_nan(figures),
            "repeats": [repeat.to_json(whole=False) for repeat in self.repeats],
            "probes": [probe.to_json(whole=False) for probe in self.probes],
        }


Probe = Callable[[float], LoadResult]


def find_capacity(
    url: str,
    model: str,
    load: Load,
    *,
    start: float = 1.0,
    effort: Effort = THOROUGH,
    metrics_url: str | None = None,
    api_key: str = "",
    progress: Callable[[str], None] | None = None,
    probes: list[LoadResult] | None = None,
) -> Capacity:
    """Searches from `start` requests a second. `probes` is filled while it searches: it is what an error leaves.

    Raises BadInput without an objective, Missed where no rate meets it, RunFailed or ClientError where the server or
    the load generator does not last, KeyboardInterrupt.
    """
    if parse_slo(load.slo) is None:
        raise BadInput("a capacity is of an objective", hint='for example --slo "ttft_p95<200ms, itl_p95<50ms"')
    if not 0 < start < math.inf:
        raise BadInput(f"the search starts at a rate above 0, got {start:g}")

    tried: Counter[float] = Counter()

    def probe(rate: float) -> LoadResult:
        duration_s = max(load.duration_s, effort.least_requests / rate)
        # The same arrivals at every rate, so that rates compare; others when one is repeated, or it repeats its luck.
        this_load = replace(load, rate=rate, duration_s=duration_s, seed=load.seed + tried[rate])
        tried[rate] += 1
        result = run_locust(url, model, this_load, metrics_url=metrics_url, api_key=api_key)
        if progress:
            progress(_said(rate, result))
        return result

    return search(probe, start, effort, probes)


def search(probe: Probe, start: float, effort: Effort = THOROUGH, probes: list[LoadResult] | None = None) -> Capacity:
    """The search itself, over anything that measures a rate."""
    probes = [] if probes is None else probes

    def holds(rate: float) -> bool:
        result = probe(rate)
        probes.append(result)
        if result.failure is not None:
            raise result.failure
        if not any(one.summary.requests for one in probes):
            # Not too slow, but broken: a lower rate would not be served either.
            failed = result.summary.failures_said or "none ended in time"
            raise RunFailed(f"no request succeeded at {rate:.3g} requests/s ({failed})", hint=_LOWER)
        if result.problems and result.summary.slo_met is False:
            # Whose fault it was cannot be told.
            hint = "start it on a faster or quieter machine, or with --processes"
            raise RunFailed(
                f"the load generator cannot keep up at {rate:.3g} requests/s: {result.problems[0]}", hint=hint
            )
        return result.summary.slo_met and result.summary.requests > 0

    low, high = _bracket(holds, start)
    while high / low > effort.precision:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    while True:
        if all(holds(low) for _ in range(effort.repeats)):
            break
        low /= effort.precision
        if low < _LOWEST:
            raise _never(low, probes[-1])
    repeats = tuple(probes[-effort.repeats :])
    return Capacity(
        rate=low,
        goodput_per_s=statistics.median(result.summary.goodput_per_s or 0.0 for result in repeats),
        tokens_per_s=statistics.median(result.summary.tokens_per_s for result in repeats),
        repeats=repeats,
        probes=tuple(probes),
    )


def _bracket(holds: Callable[[float], bool], start: float) -> tuple[float, float]:
    """A rate that meets the objective and one that misses it, at most twice as high."""
    rate = start
    if holds(rate):
        while holds(rate * 2):
            rate *= 2
        return rate, rate * 2
    while rate / 2 >= _LOWEST:
        rate /= 2
        if holds(rate):
            return rate, rate * 2
    raise Missed(
        f"no rate from {_LOWEST:g} requests/s upwards meets the objective",
        hint="look at the figures of a single user: loadtest run --users 1",
    )


def _never(rate: float, result: LoadResult) -> Missed:
    return Missed(
        f"no rate from {rate:.2g} requests/s upwards meets the objective again and again", hint=_said(rate, result)
    )


def capacity_table(capacity: Capacity) -> str:
    """rate | met | goodput | latencies, by rate; and the end point, where there is one, in a line."""
    header = ["requests/s", "SLO", "goodput/s", "tokens/s", "TTFT ms p50/p95", "ITL ms p50/p95", "failed"]
    rows = []
    for probe in sorted(capacity.probes, key=lambda one: one.load.rate):
        s = probe.summary
        verdict = "cut short" if probe.failure is not None else "met" if s.slo_met else "missed"
        row = [f"{probe.load.rate:.2f}", verdict, number(s.goodput_per_s or 0.0, 2)]
        row += [number(s.tokens_per_s, 1)]
        row += [f"{number(spread.p50_ms, 1)} / {number(spread.p95_ms, 1)}" for spread in (s.ttft, s.itl)]
        rows.append([*row, str(sum(s.failures.values()))])
    table = align(header, rows)
    if not capacity.repeats:
        return table
    end = f"capacity: {capacity.rate:.2f} requests/s, goodput {capacity.goodput_per_s:.2f} requests/s"
    runs = "another run" if len(capacity.repeats) == 1 else f"{len(capacity.repeats)} more runs"
    return f"{table}\n{end}, {capacity.tokens_per_s:.1f} tokens/s ({runs} there met the objective)"


def _said(rate: float, result: LoadResult) -> str:
    verdicts = ", ".join(
        f"{v.limit} {'met' if v.met else 'missed'} at {number(v.value, 1)}" for v in result.summary.verdicts
    )
    return f"{rate:.3g} requests/s: {verdicts}"
