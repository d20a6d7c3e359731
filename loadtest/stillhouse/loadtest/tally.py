"""What many requests come to: counted where they happen, added up over workers, summed up at the end.

Rates are over the time from the first request's start to the last token's arrival (or the last failure).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from stillhouse.loadtest.histogram import CURVE, Latencies, Spread
from stillhouse.loadtest.recount import CountCheck
from stillhouse.loadtest.samples import CUT, OK, Sample
from stillhouse.loadtest.slo import METRICS, Limit, Slo, is_good


@dataclass(frozen=True)
class Verdict:
    """One limit of the objective, and what was measured."""

    limit: str
    value: float  # in the limit's unit: milliseconds, or per cent of errors; NaN where there was nothing to measure
    met: bool


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
    tokens_per_s_per_user: float  # while an answer comes: 1 / mean inter-token latency
    ttft: Spread
    answer: Spread  # time to the first token after the thoughts
    itl: Spread
    e2e: Spread
    late: Spread  # how late the client itself was; 0 in a closed loop
    counted_by_server: bool
    prompt_tokens_per_request: float | None = None  # as the server counted them
    good: int | None = None  # requests that met the objective; None without one
    goodput_per_s: float | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    with_thoughts: int = 0  # finished answers whose first token was of thoughts
    count_check: CountCheck | None = None  # None without a tokenizer

    @property
    def failures_said(self) -> str:
        """The kinds of failures and how many there were of each."""
        return ", ".join(f"{kind} {count}" for kind, count in sorted(self.failures.items()))

    @property
    def slo_met(self) -> bool:
        return all(verdict.met for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = without_nan(asdict(self))
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Summary:
        value = dict(value)
        for name in (*METRICS, "late"):
            value[name] = Spread(**{key: _number(item) for key, item in value[name].items()})
        for name in ("tokens_per_answer", "tokens_per_s_per_user"):
            value[name] = _number(value[name])
        verdicts = value.get("verdicts", [])
        unknown = {True: math.nan, False: math.inf}  # what JSON does not know: nothing to measure, or never came
        value["verdicts"] = [
            Verdict(v["limit"], unknown[v["met"]] if v["value"] is None else v["value"], v["met"]) for v in verdicts
        ]
        if value.get("count_check") is not None:
            value["count_check"] = CountCheck(**value["count_check"])
        return cls(**value)


@dataclass
class Tally:
    """One model's requests so far."""

    model: str
    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)  # by latency: what never came, though it should have
    cut: int = 0
    good: int = 0
    tokens: int = 0
    answer_tokens: int = 0  # of finished answers
    prompt_tokens: int = 0
    prompts: int = 0  # whose tokens the server counted
    begun_s: float = math.inf
    ended_s: float = -math.inf
    counted_by_server: bool = True
    with_thoughts: int = 0
    count_check: CountCheck = field(default_factory=CountCheck)
    latencies: dict[str, Latencies] = field(default_factory=lambda: {name: Latencies() for name in (*METRICS, "late")})

    def add(self, sample: Sample, slo: Slo | None = None) -> None:
        self.begun_s = min(self.begun_s, sample.start_s)
        self.ended_s = max(self.ended_s, sample.end_s)
        self.tokens += sample.tokens
        if sample.prompt_tokens is not None:
            self.prompt_tokens += sample.prompt_tokens
            self.prompts += 1
        # An OpenAI API counts at an answer's end: one that was cut off says nothing about its server.
        self.counted_by_server &= sample.counted_by_server or sample.outcome != OK
        well, failed = sample.outcome == OK, sample.outcome not in (OK, CUT)
        self._record("late", sample.late_s, missing=False)
        self._record("ttft", None if failed else sample.ttft_s, missing=failed)
        self._record("answer", None if failed else sample.answer_s, missing=well or failed)
        self._record("itl", None if failed else sample.itl_s, missing=failed)
        self._record("e2e", sample.e2e_s if well else None, missing=failed)
        if well:
            self.requests += 1
            self.answer_tokens += sample.tokens
            self.with_thoughts += sample.answer_s is not None and sample.answer_s != sample.ttft_s
            if sample.recounted is not None and sample.counted_by_server:
                self.count_check.add(sample.tokens, sample.recounted)
        elif failed:
            self.failures[sample.outcome] += 1
        else:
            self.cut += 1
        if slo is not None:
            self.good += is_good(slo, sample)

    def _record(self, name: str, value_s: float | None, *, missing: bool) -> None:
        if value_s is not None:
            self.latencies[name].add(value_s)
        elif missing:
            self.missing[name] += 1

    def merge(self, other: Tally) -> None:
        self.requests += other.requests
        self.failures.update(other.failures)
        self.missing.update(other.missing)
        self.cut += other.cut
        self.good += other.good
        self.tokens += other.tokens
        self.answer_tokens += other.answer_tokens
        self.with_thoughts += other.with_thoughts
        self.prompt_tokens += other.prompt_tokens
        self.prompts += other.prompts
        self.begun_s = min(self.begun_s, other.begun_s)
        self.ended_s = max(self.ended_s, other.ended_s)
        self.counted_by_server &= other.counted_by_server
        self.count_check.merge(other.count_check)
        for name, latencies in other.latencies.items():
            self.latencies[name].merge(latencies)

    def to_json(self) -> dict[str, Any]:
        latencies = {name: one.to_json() for name, one in self.latencies.items()}
        counts = {"failures": dict(self.failures), "missing": dict(self.missing)}
        return {**self.__dict__, **counts, "count_check": self.count_check.to_json(), "latencies": latencies}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Tally:
        latencies = {name: Latencies.from_json(one) for name, one in value["latencies"].items()}
        counts = {name: Counter(value[name]) for name in ("failures", "missing")}
        count_check = CountCheck(**value["count_check"])
        return cls(**{**value, **counts, "count_check": count_check, "latencies": latencies})

    def summary(self, slo: Slo | None = None) -> Summary:
        duration_s = max(self.ended_s - self.begun_s, 0.0)
        spreads = {name: one.spread() for name, one in self.latencies.items()}
        mean_itl_ms = spreads["itl"].mean_ms
        return Summary(
            model=self.model,
            requests=self.requests,
            failures=dict(self.failures),
            cut=self.cut,
            duration_s=duration_s,
            tokens=self.tokens,
            tokens_per_s=_per(self.tokens, duration_s),
            requests_per_s=_per(self.requests, duration_s),
            tokens_per_answer=self.answer_tokens / self.requests if self.requests else math.nan,
            tokens_per_s_per_user=1e3 / mean_itl_ms if mean_itl_ms > 0 else math.nan,
            counted_by_server=self.counted_by_server,
            prompt_tokens_per_request=self.prompt_tokens / self.prompts if self.prompts else None,
            good=None if slo is None else self.good,
            goodput_per_s=None if slo is None else _per(self.good, duration_s),
            with_thoughts=self.with_thoughts,
            count_check=self.count_check if self.count_check.answers else None,
            verdicts=[] if slo is None else [self._verdict(limit) for limit in slo.limits],
            **spreads,
        )

    def _verdict(self, limit: Limit) -> Verdict:
        failed = sum(self.failures.values())
        if limit.metric == "errors":
            asked = self.requests + failed
            value = 100 * failed / asked if asked else 100.0
        elif limit.statistic == "mean":
            value = math.inf if self.missing[limit.metric] else self.latencies[limit.metric].spread().mean_ms
        else:
            percent = 100.0 if limit.statistic == "max" else float(limit.statistic[1:])
            (value,) = self.latencies[limit.metric].percentiles_ms([percent], self.missing[limit.metric])
        # Answers of one token have no gap that could be too long.
        met = value < limit.limit or (limit.metric == "itl" and math.isnan(value))
        return Verdict(limit.text, value, met)

    def curves(self) -> dict[str, list[list[float]]]:
        """[per cent, milliseconds] along each latency's distribution."""
        return {
            name: [list(pair) for pair in zip(map(float, CURVE), one.percentiles_ms(CURVE), strict=True)]
            for name, one in self.latencies.items()
            if name in METRICS and len(one)
        }


def tally_up(samples: Iterable[Sample], slo: Slo | None = None) -> dict[str, Tally]:
    """A tally for each model, in the order of their names."""
    tallies: dict[str, Tally] = {}
    for sample in samples:
        tallies.setdefault(sample.model, Tally(sample.model)).add(sample, slo)
    return dict(sorted(tallies.items()))


def summarize(samples: Iterable[Sample], slo: Slo | None = None) -> list[Summary]:
    return [tally.summary(slo) for tally in tally_up(samples, slo).values()]


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _number(value: float | None) -> float:
    return math.nan if value is None else value
