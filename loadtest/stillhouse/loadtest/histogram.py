"""Latencies in a histogram that merges, so that percentiles are right over several workers: HdrHistogram's.

Whole microseconds from 1 µs to 2 hours, kept to three digits: a percentile is at most 0.1 % off, whichever way the
values were spread over processes. Mean and maximum are exact. http://hdrhistogram.org
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hdrh.histogram import HdrHistogram

_LONGEST_US = 7_200_000_000
_DIGITS = 3
_ROUNDING = 1e-9  # 99.9 % of 1000 values are 999, whatever floats make of it
# Where the curve of the report is read: the closer to 100, the denser.
CURVE = (0.0, 5.0, *range(10, 90, 5), *range(90, 99), 99.0, 99.5, 99.9, 99.99, 100.0)


@dataclass(frozen=True)
class Spread:
    """What many latencies come to, in milliseconds; NaN where there were none."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


class Latencies:
    """Seconds go in, percentiles in milliseconds come out; two can be added, and one can travel as JSON."""

    def __init__(self, values_s: Iterable[float] = ()) -> None:
        self._histogram = HdrHistogram(1, _LONGEST_US, _DIGITS)
        self._sum_s = 0.0
        self._max_s = -math.inf
        for value_s in values_s:
            self.add(value_s)

    def __len__(self) -> int:
        return int(self._histogram.get_total_count())

    def add(self, value_s: float) -> None:
        self._sum_s += value_s
        self._max_s = max(self._max_s, value_s)
        self._histogram.record_value(min(max(1, round(value_s * 1e6)), _LONGEST_US))

    def merge(self, other: Latencies) -> None:
        self._histogram.add(other._histogram)
        self._sum_s += other._sum_s
        self._max_s = max(self._max_s, other._max_s)

    def percentiles_ms(self, percents: Sequence[float], missing: int = 0) -> list[float]:
        """The values at `percents` (0 … 100), the lowest that at least so many per cent do not exceed: nearest rank.

        `missing` values count as longer than any other (answers that never came): infinite where a percentile falls
        among them. NaN where there is nothing at all.
        """
        count = len(self)
        if not count:
            return [math.inf if missing else math.nan] * len(percents)
        ranks = [max(1, math.ceil(percent * (count + missing) / 100 - _ROUNDING)) for percent in percents]
        # HdrHistogram rounds a rank half up, which may leave out one value too many: a quarter below, it is ours.
        asked = {rank: 100 * (rank - 0.25) / count for rank in ranks if rank <= count}
        found = self._histogram.get_percentile_to_value_dict(list(asked.values()))
        # Its buckets give their upper edge, which may lie beyond the longest value there was.
        longest_ms = self._max_s * 1e3
        return [math.inf if rank > count else min(found[asked[rank]] / 1e3, longest_ms) for rank in ranks]

    def spread(self) -> Spread:
        if not len(self):
            return Spread(*[math.nan] * 6)
        p50, p90, p95, p99 = self.percentiles_ms((50, 90, 95, 99))
        return Spread(1e3 * self._sum_s / len(self), p50, p90, p95, p99, self._max_s * 1e3)

    def to_json(self) -> dict[str, Any]:
        if not len(self):
            return {}
        return {"hdr": self._histogram.encode().decode("ascii"), "sum_s": self._sum_s, "max_s": self._max_s}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Latencies:
        latencies = cls()
        if value:
            latencies._histogram.decode_and_add(value["hdr"])
            latencies._sum_s, latencies._max_s = value["sum_s"], value["max_s"]
        return latencies
