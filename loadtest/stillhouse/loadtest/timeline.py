"""What went on at each moment of a run, from its samples: tokens a second, requests and tokens in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.loadtest.arrivals import Stage
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.tally import Summary


@dataclass(frozen=True)
class Step:
    """One level of load and what it came to; for throughput against latency."""

    label: str
    summary: Summary


def tokens_by_second(samples: Sequence[Sample]) -> list[float]:
    """Tokens that arrived in each whole second of the run; an answer's are spread evenly from its first to its last."""
    if not samples:
        return []
    zero_s = min(sample.start_s for sample in samples)
    seconds = max(1, math.floor(max(sample.end_s for sample in samples) - zero_s))
    bins = [0.0] * seconds
    for sample in samples:
        if not sample.tokens or sample.last_s is None:
            continue
        first_s = sample.start_s - zero_s + (sample.last_s if sample.ttft_s is None else sample.ttft_s)
        step_s = sample.itl_s or 0.0
        for token in range(sample.tokens):
            second = int(first_s + token * step_s)
            if second < seconds:
                bins[second] += 1
    return bins


def in_flight(samples: Sequence[Sample], points: int = 200) -> list[tuple[float, int, float]]:
    """(seconds from the begin, requests under way, tokens that they have yet to bring) at evenly spaced moments."""
    if not samples:
        return []
    zero_s = min(sample.start_s for sample in samples)
    length_s = max(sample.end_s for sample in samples) - zero_s
    moments = [length_s * (point + 0.5) / points for point in range(points)]
    found = []
    for moment_s in moments:
        under_way = [one for one in samples if one.start_s - zero_s <= moment_s < one.end_s - zero_s]
        to_come = 0.0
        for one in under_way:
            if one.ttft_s is None or one.last_s is None or one.last_s <= one.ttft_s:
                to_come += one.tokens
            else:
                passed = (moment_s - (one.start_s - zero_s) - one.ttft_s) / (one.last_s - one.ttft_s)
                to_come += one.tokens * (1 - min(1.0, max(0.0, passed)))
        found.append((moment_s, len(under_way), to_come))
    return found


def by_stage(samples: Sequence[Sample], stages: Sequence[Stage], zero_s: float) -> list[list[Sample]]:
    """The samples by the stage in which they started; the first stage begins at `zero_s`, of the samples' clock."""
    parts: list[list[Sample]] = [[] for _ in stages]
    for sample in samples:
        time_s = sample.start_s - zero_s
        for number, stage in enumerate(stages):
            if time_s < stage.duration_s or number == len(stages) - 1:
                parts[number].append(sample)
                break
            time_s -= stage.duration_s
    return parts
