"""What is measured of each request, and what it comes to.

Formulas (seconds inside, milliseconds where a name says so):
- TTFT: from sending the request to its first token
- inter-token latency of a request: (time of its last token - TTFT) / (tokens - 1), for two tokens and more; of answers
  that the test's end cut off too, or the slowest would be missing
- end to end: from sending the request to its last token
- tokens/s: all tokens that arrived, of unfinished answers too, over the time from the first request's sending to the
  last token's arrival (or the last failure)
Percentiles interpolate linearly between the kept samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One request. `end_s` and `start_s` are of the wall clock, so that those of several machines go together."""

    model: str
    start_s: float
    end_s: float
    ttft_s: float | None  # None: no token came
    last_s: float | None  # from sending to the last token that came
    tokens: int  # counted by the server, or else by the responses that came
    counted_by_server: bool
    outcome: str  # "ok", "cut" (the test ended first), or the error's class name

    @property
    def itl_s(self) -> float | None:
        if self.ttft_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.tokens - 1)


@dataclass(frozen=True)
class Spread:
    """What a list of latencies comes to, in milliseconds; NaN where there were none."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Summary:
    """One model's figures over one run."""

    model: str
    requests: int  # finished well
    failures: dict[str, int]  # by the error's class name
    cut: int  # unfinished when the test ended
    duration_s: float
    tokens: int
    tokens_per_s: float
    requests_per_s: float
    tokens_per_answer: float
    ttft: Spread
    itl: Spread
    e2e: Spread
    counted_by_server: bool

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = _without_nan(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Summary:
        spreads = {
            name: Spread(**{k: math.nan if v is None else v for k, v in value[name].items()})
            for name in ("ttft", "itl", "e2e")
        }
        numbers = {"tokens_per_answer": math.nan if value["tokens_per_answer"] is None else value["tokens_per_answer"]}
        return cls(**{**value, **spreads, **numbers})


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the sorted values lie, interpolated; NaN where there are none."""
    if not ordered:
        return math.nan
    place = fraction * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(samples: Iterable[Sample]) -> list[Summary]:
    """A summary for each model, in the order of their names."""
    by_model: dict[str, list[Sample]] = {}
    for sample in samples:
        by_model.setdefault(sample.model, []).append(sample)
    return [_summarize(model, by_model[model]) for model in sorted(by_model)]


def _summarize(model: str, samples: list[Sample]) -> Summary:
    good = [s for s in samples if s.outcome == "ok"]
    duration_s = max(s.end_s for s in samples) - min(s.start_s for s in samples)
    tokens = sum(s.tokens for s in samples)
    return Summary(
        model=model,
        requests=len(good),
        failures=dict(Counter(s.outcome for s in samples if s.outcome not in ("ok", "cut"))),
        cut=sum(s.outcome == "cut" for s in samples),
        duration_s=duration_s,
        tokens=tokens,
        tokens_per_s=tokens / duration_s if duration_s > 0 else 0.0,
        requests_per_s=len(good) / duration_s if duration_s > 0 else 0.0,
        tokens_per_answer=sum(s.tokens for s in good) / len(good) if good else math.nan,
        ttft=_spread([s.ttft_s for s in samples if s.ttft_s is not None]),
        itl=_spread([s.itl_s for s in samples if s.outcome in ("ok", "cut") and s.itl_s is not None]),
        e2e=_spread([s.end_s - s.start_s for s in good]),
        counted_by_server=all(s.counted_by_server for s in samples if s.tokens),
    )


def _spread(values_s: list[float]) -> Spread:
    ordered = sorted(value * 1000 for value in values_s)
    mean = sum(ordered) / len(ordered) if ordered else math.nan
    return Spread(mean, percentile(ordered, 0.5), percentile(ordered, 0.95), percentile(ordered, 0.99))


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
