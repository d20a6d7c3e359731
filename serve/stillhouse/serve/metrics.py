"""stillhouse's metrics on Triton's own metrics page, in vLLM's words (DESIGN §4).

Everything that touches Triton's metrics runs on one thread: calls from several abort the whole server. The others
put figures into a queue.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.engine.buckets import LATENCY_BUCKETS_S, TOKEN_BUCKETS_S
from stillhouse.serve.errors import METRIC_KINDS, metric_kind

if TYPE_CHECKING:
    from stillhouse.engine.answer import Chunk
    from stillhouse.engine.core import Stats
    from stillhouse.engine.errors import StillhouseError

log = logging.getLogger(__name__)

_EVERY_S = 0.25

GAUGES = {
    "num_requests_running": "Requests that hold a slot",
    "num_requests_waiting": "Requests that wait for a slot",
    "kv_cache_usage_perc": "Share of the KV cache in use, 0 to 1",
    "process_resident_memory_bytes": "Resident memory of the model's process",
}
COUNTERS = {
    "prompt_tokens_total": "Prompt tokens processed",
    "generation_tokens_total": "Tokens generated",
    "request_success_total": "Requests that ended with stop or length",
    "request_errors_total": "Requests that were refused or ended with an error",
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From submission to the first token", LATENCY_BUCKETS_S),
    "inter_token_latency_seconds": ("Between two tokens of a request", TOKEN_BUCKETS_S),
    "e2e_request_latency_seconds": ("From submission to the last token", LATENCY_BUCKETS_S),
    "request_queue_time_seconds": ("From submission to a slot", LATENCY_BUCKETS_S),
}
SUCCESSES = ("stop", "length")
ERROR_KINDS = tuple(METRIC_KINDS.values())


class Metrics:
    """Publishes a model's figures: gauges and counters from `stats`, the rest as it is told."""

    def __init__(self, pb_utils: Any, model: str, version: str, stats: Callable[[], Stats]) -> None:
        self._pb_utils = pb_utils
        # Two processes of one version may run for a while, the old one ending its streams. With the same labels they
        # would share what Triton keeps, and the server dies when one of them takes its own off the page.
        self._labels = {"model_name": model, "model_version": version, "process": str(os.getpid())}
        self._stats = stats
        self._observations: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._errors: queue.SimpleQueue[str] = queue.SimpleQueue()  # their kinds
        self._left_out: Counter[str] = Counter()
        self._closing = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._loop, name="stillhouse-metrics", daemon=True)
        self._thread.start()

    def observe(self, name: str, value_s: float) -> None:
        """Adds a value to a histogram; returns at once, from any thread."""
        if not self._ended:  # nobody would ever take it out
            self._observations.put((name, value_s))

    def count_error(self, error: StillhouseError) -> None:
        """Counts an error that a request is told; returns at once, from any thread. Triton counts only its own."""
        if not self._ended:
            self._errors.put(metric_kind(error))

    def leave_out(self, chunk: Chunk) -> None:
        """Has the counters not count what `chunk` brings; called on the engine's thread."""
        self._left_out["generation_tokens_total"] += len(chunk.token_ids)
        if chunk.finish_reason in SUCCESSES:
            self._left_out[chunk.finish_reason] += 1
            self._left_out["prompt_tokens_total"] += chunk.num_prompt_tokens

    def close(self) -> None:
        """Publishes what is queued and takes this version's figures off the page."""
        self._closing.set()
        self._thread.join()

    def _loop(self) -> None:
        try:
            self._run()
        except self._pb_utils.TritonModelException as error:
            # A server that was started with --allow-metrics=false: the model serves all the same.
            log.warning("no metrics: %s", error)
        finally:
            self._ended = True

    def _run(self) -> None:
        with self._registered() as (gauges, counters, histograms):
            published = dict.fromkeys(counters, 0)
            while True:
                last = self._closing.wait(_EVERY_S)
                self._publish(gauges, counters, published)
                while not self._observations.empty():
                    name, value_s = self._observations.get()
                    histograms[name].observe(value_s)
                while not self._errors.empty():
                    counters[self._errors.get()].increment(1)
                if last:
                    return

    def _publish(self, gauges: dict[str, Any], counters: dict[str, Any], published: dict[str, int]) -> None:
        stats = self._stats()
        gauges["num_requests_running"].set(stats.running)
        gauges["num_requests_waiting"].set(stats.waiting)
        gauges["kv_cache_usage_perc"].set(stats.kv_tokens_used / max(1, stats.kv_tokens_capacity))
        gauges["process_resident_memory_bytes"].set(resident_memory_bytes())
        totals = {
            "prompt_tokens_total": stats.prompt_tokens_total,
            "generation_tokens_total": stats.generation_tokens_total,
            **{reason: stats.requests_finished.get(reason, 0) for reason in SUCCESSES},
        }
        for name, counted in totals.items():
            total = counted - self._left_out[name]
            if total > published[name]:
                counters[name].increment(total - published[name])
                published[name] = total

    @contextmanager
    def _registered(self) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """The metrics by name (successes by reason, errors by kind); they leave the page when the block ends."""
        family = self._pb_utils.MetricFamily
        families = {
            name: family(name=f"stillhouse_{name}", description=text, kind=kind)
            for kind, group in ((family.GAUGE, GAUGES), (family.COUNTER, COUNTERS))
            for name, text in group.items()
        }
        timings = {
            name: family(name=f"stillhouse_{name}", description=text, kind=family.HISTOGRAM)
            for name, (text, _) in HISTOGRAMS.items()
        }
        gauges = {name: families[name].Metric(labels=self._labels) for name in GAUGES}
        counters = {
            name: families[name].Metric(labels=self._labels)
            for name in ("prompt_tokens_total", "generation_tokens_total")
        }
        for reason in SUCCESSES:
            labels = self._labels | {"finished_reason": reason}
            counters[reason] = families["request_success_total"].Metric(labels=labels)
        for kind in ERROR_KINDS:
            counters[kind] = families["request_errors_total"].Metric(labels=self._labels | {"kind": kind})
        histograms = {
            name: timings[name].Metric(labels=self._labels, buckets=list(buckets))
            for name, (_, buckets) in HISTOGRAMS.items()
        }
        yield gauges, counters, histograms
        # Metrics before their families, as Triton wants it.
        for group in (gauges, counters, histograms, families, timings):
            group.clear()


def resident_memory_bytes() -> int:
    """The resident set of this process, from /proc."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
