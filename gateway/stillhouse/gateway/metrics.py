"""The gateway's own figures for Prometheus, and the engine's where nobody else publishes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from stillhouse.engine.answer import Chunk
from stillhouse.engine.buckets import LATENCY_BUCKETS_S, TOKEN_BUCKETS_S
from stillhouse.gateway.generator import Figure, ServedModel

_PREFIX = "stillhouse_gateway"
_MODEL = ("model_name", "model_version")


class Metrics:
    """One registry a gateway, so that two may live in one process. Used from the event loop alone."""

    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineFigures(figures))
        self.requests = Counter(
            f"{_PREFIX}_requests", "HTTP requests by path and status", ("path", "status"), registry=registry
        )
        self.in_flight = Gauge(f"{_PREFIX}_requests_in_flight", "Requests that are being answered", registry=registry)
        self.prompt_tokens = Counter(
            f"{_PREFIX}_prompt_tokens", "Tokens of prompts that were answered", _MODEL, registry=registry
        )
        self.generation_tokens = Counter(f"{_PREFIX}_generation_tokens", "Tokens of answers", _MODEL, registry=registry)
        self.time_to_first_token = Histogram(
            f"{_PREFIX}_time_to_first_token_seconds",
            "From the request's body to its first token",
            _MODEL,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            f"{_PREFIX}_inter_token_latency_seconds",
            "Between two tokens of an answer",
            _MODEL,
            buckets=TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.request_duration = Histogram(
            f"{_PREFIX}_request_duration_seconds",
            "From the request's head to the end of its answer",
            ("path",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )

    def add(self, collector: Collector) -> None:
        """Figures of whoever serves through this gateway; collected whenever the page is asked for."""
        self._registry.register(collector)

    def page(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self._registry)


class Meter:
    """Measures one request's answers; made when its body has come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun_s = time.perf_counter()
        self._last_s: dict[int, float] = {}

    def begin(self, model: ServedModel) -> None:
        """It is known who answers."""
        labels, metrics = (model.name, str(model.version)), self._metrics
        self._prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self._tokens = metrics.generation_tokens.labels(*labels)
        self._first = metrics.time_to_first_token.labels(*labels)
        self._between = metrics.inter_token_latency.labels(*labels)

    def take_prompt(self, num_tokens: int) -> None:
        """A prompt's first chunk has come, however many answers it has."""
        self._prompt_tokens.inc(num_tokens)

    def take(self, number: int, chunk: Chunk) -> None:
        """A chunk of answer `number` has come."""
        if not chunk.token_ids:
            return
        now_s, before_s = time.perf_counter(), self._last_s.get(number)
        if before_s is not None:
            self._between.observe(now_s - before_s)
        elif not self._last_s:
            self._first.observe(now_s - self._begun_s)
        self._last_s[number] = now_s
        self._tokens.inc(len(chunk.token_ids))


class _EngineFigures(Collector):
    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        self._figures = figures

    def describe(self) -> Iterable[Metric]:
        # Nothing is asked while registering: the engine may not be there yet.
        return ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for figure in self._figures():
            kind = CounterMetricFamily if figure.name.endswith("_total") else GaugeMetricFamily
            if figure.name not in families:
                families[figure.name] = kind(f"stillhouse_{figure.name}", figure.description, labels=list(_MODEL))
            families[figure.name].add_metric([figure.model, str(figure.version)], figure.value)  # type: ignore[attr-defined]
        yield from families.values()
