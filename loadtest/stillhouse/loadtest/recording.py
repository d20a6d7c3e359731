"""One test in this process: whom it asks, what came of it, and how workers tell their master."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

from stillhouse.client import ClientError
from stillhouse.loadtest.errors import LoadtestError
from stillhouse.loadtest.prompts import Workload
from stillhouse.loadtest.recount import CountTokens
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.shapes import Shape
from stillhouse.loadtest.slo import Slo
from stillhouse.loadtest.tally import Tally, without_nan
from stillhouse.loadtest.target import Target, open_target
from stillhouse.loadtest.watch import ClientState, LoopWatch, ServerWatch, validity

# Requests that share a target, and so an HTTP/2 connection over gRPC: many servers let 100 or 128 streams into one.
REQUESTS_PER_TARGET = 100
MOST_SAMPLES = 50_000


@dataclass
class Slot:
    """A target and how many requests it has open."""

    target: Target
    busy: int = 0


class Reservoir:
    """All samples, or a fair choice of them where there are too many (Vitter's algorithm R)."""

    def __init__(self) -> None:
        self.kept: list[Sample] = []
        self.seen = 0
        self._chance = random.Random(0)

    def add(self, sample: Sample) -> None:
        self.seen += 1
        if len(self.kept) < MOST_SAMPLES:
            self.kept.append(sample)
        elif (place := self._chance.randrange(self.seen)) < MOST_SAMPLES:
            self.kept[place] = sample


@dataclass
class Run:
    """One test."""

    host: str = ""
    protocol: str = ""
    api_key: str = ""
    timeout_s: float = 300.0
    token_timeout_s: float = 30.0
    model: str = ""
    workload: Workload = field(default_factory=lambda: Workload([]))
    shape: Shape | None = None
    slo: Slo | None = None
    count_tokens: CountTokens | None = None  # where a tokenizer was given
    problem: LoadtestError | ClientError | None = None  # it cannot begin
    ended_early: str = ""  # why it was ended before its time
    in_flight: int = 0
    begun_s: float = field(default_factory=time.time)
    slots: list[Slot] = field(default_factory=list)
    samples: Reservoir = field(default_factory=Reservoir)
    tallies: dict[str, Tally] = field(default_factory=dict)
    clients: dict[str, ClientState] = field(default_factory=dict)  # of this process or the workers, by their name
    reported: set[str] = field(default_factory=set)  # the workers whose last report is there
    loop: LoopWatch = field(default_factory=LoopWatch)
    server: ServerWatch = field(default_factory=ServerWatch)

    @property
    def is_open(self) -> bool:
        """Whether a plan says when requests are sent, whatever the server does."""
        return self.workload.times_s is not None or (self.shape is not None and not self.shape.in_users)

    @contextmanager
    def target(self) -> Iterator[Target]:
        """A target for one request: one that has room, or a new one."""
        slot = next((slot for slot in self.slots if slot.busy < REQUESTS_PER_TARGET), None)
        if slot is None:
            slot = Slot(self.new_target())
            self.slots.append(slot)
        slot.busy += 1
        try:
            yield slot.target
        finally:
            slot.busy -= 1

    def new_target(self) -> Target:
        return open_target(
            self.host,
            self.protocol,
            timeout_s=self.timeout_s,
            token_timeout_s=self.token_timeout_s,
            api_key=self.api_key,
        )

    def record(self, sample: Sample) -> None:
        self.samples.add(sample)
        self._tally(sample.model).add(sample, self.slo)
        self.server.note(sample)

    def _tally(self, model: str) -> Tally:
        if model not in self.tallies:  # a tally is not made for nothing: its histograms cost two milliseconds
            self.tallies[model] = Tally(model)
        return self.tallies[model]

    def close(self) -> None:
        while self.slots:
            self.slots.pop().target.close()

    def hand_over(self) -> dict[str, Any]:
        """What came since the last time, for the master; it is forgotten here."""
        data = {
            "tallies": [tally.to_json() for tally in self.tallies.values()],
            "samples": [astuple(sample) for sample in self.samples.kept],
            "client": self.loop.state().to_json(),
            "in_flight": self.in_flight,
        }
        self.tallies, self.samples = {}, Reservoir()
        return data

    def take_over(self, worker: str, data: dict[str, Any]) -> None:
        for value in data["tallies"]:
            tally = Tally.from_json(value)
            self._tally(tally.model).merge(tally)
        for value in data["samples"]:
            self.samples.add(Sample(*value))
        self.clients[worker] = ClientState(**data["client"])

    def result(self) -> dict[str, Any]:
        """Everything as JSON; the samples as lists, their fields named beside."""
        tallies = dict(sorted(self.tallies.items()))
        summaries = {name: tally.summary(self.slo) for name, tally in tallies.items()}
        late_p95_ms = max((summary.late.p95_ms for summary in summaries.values()), default=0.0)
        problems = validity(list(self.clients.values()), late_p95_ms)
        value: dict[str, Any] = without_nan(
            {
                "schema": 1,
                "protocol": self.protocol,
                "slo": str(self.slo or ""),
                "summaries": [summary.to_json() for summary in summaries.values()],
                "curves": {name: tally.curves() for name, tally in tallies.items()},
                "client": {
                    "valid": not problems,
                    "problems": problems,
                    "processes": {name: state.to_json() for name, state in self.clients.items()},
                },
                "tallies": [tally.to_json() for tally in tallies.values()],
                "left_out": self.workload.left_out,
                "ended_early": self.ended_early,
                "sample_fields": list(Sample.__dataclass_fields__),
                "samples_seen": self.samples.seen,
                "samples": [list(astuple(sample)) for sample in self.samples.kept],
            }
        )
        return value

    def progress(self) -> dict[str, Any]:
        tallies = self.tallies.values()
        return {
            "elapsed_s": round(time.time() - self.begun_s, 1),
            "answers": sum(tally.requests for tally in tallies),
            "failed": sum(sum(tally.failures.values()) for tally in tallies),
            "tokens": sum(tally.tokens for tally in tallies),
        }
