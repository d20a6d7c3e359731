"""A service level objective in one line: "ttft_p95<200ms, itl_p95<50ms, errors<1%".

A run meets it when every limit holds over all its requests; requests that failed count as infinitely slow. A single
request is good when it succeeded and each of its own latencies is under its limit: what is counted as goodput
(Zhong et al., DistServe, 2024).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.samples import OK, Sample

METRICS = ("ttft", "answer", "itl", "e2e")
_FORM = 'for example --slo "ttft_p95<200ms, itl_p95<50ms, errors<1%"'
_LATENCY = re.compile(
    r"(?P<metric>[a-z][a-z0-9]*)_(?P<statistic>mean|max|p\d{1,2}(?:\.\d+)?)<(?P<limit>\d+(?:\.\d+)?)(?P<unit>ms|s)"
)
_ERRORS = re.compile(r"errors<(?P<limit>\d+(?:\.\d+)?)%")


@dataclass(frozen=True)
class Limit:
    """One part of an objective: `metric` is one of METRICS (limit in milliseconds) or "errors" (in per cent)."""

    text: str
    metric: str
    statistic: str  # "p95", "mean", "max"; "" for errors
    limit: float


@dataclass(frozen=True)
class Slo:
    """All limits together."""

    limits: tuple[Limit, ...]

    def __str__(self) -> str:
        return ", ".join(limit.text for limit in self.limits)


def parse_slo(text: str, *, streamed: bool = True) -> Slo | None:
    """The objective in `text`; None where it is empty.

    Raises BadInput naming the part that cannot be read, or that answers which are not `streamed` have no figure for.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    limits = tuple(_parse(part) for part in parts)
    for limit in limits:
        if not streamed and limit.metric not in ("e2e", "errors"):
            hint = "of whole answers, limit e2e or errors; or ask for streams"
            raise BadInput(f"{limit.text} is of a stream's tokens, and --no-stream asks for none", hint=hint)
    return Slo(limits) if limits else None


def is_good(slo: Slo, sample: Sample) -> bool:
    """Whether one request by itself is as the objective wants it."""
    if sample.outcome != OK:
        return False
    took_s = {"ttft": sample.ttft_s, "answer": sample.answer_s, "itl": sample.itl_s, "e2e": sample.e2e_s}
    for limit in slo.limits:
        value_s = took_s.get(limit.metric)
        if value_s is None:
            # An answer of one token has no gap to be late in; one without first token is not good.
            if limit.metric in ("ttft", "answer"):
                return False
        elif value_s * 1e3 >= limit.limit:
            return False
    return True


def _parse(part: str) -> Limit:
    text = part.replace(" ", "").replace("<=", "<")
    errors = _ERRORS.fullmatch(text)
    if errors:
        return Limit(text, "errors", "", float(errors["limit"]))
    found = _LATENCY.fullmatch(text)
    if found is None:
        raise BadInput(f"an SLO's part is METRIC_STATISTIC<LIMIT, got {part!r}", hint=_FORM)
    if found["metric"] not in METRICS:
        raise BadInput(f"an SLO's metric is one of {', '.join(METRICS)} or errors, got {found['metric']!r}", hint=_FORM)
    limit_ms = float(found["limit"]) * (1000 if found["unit"] == "s" else 1)
    if limit_ms <= 0:
        raise BadInput(f"an SLO's limit is above 0, got {part!r}", hint=_FORM)
    return Limit(text, found["metric"], found["statistic"], limit_ms)
