"""What the server tells of itself on its metrics page: resident memory, and how long requests waited in its queue.

The names are ours or vLLM's, which differ in their prefix. https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_GAUGE = "stillhouse_process_resident_memory_bytes"
EDGE_MEMORY_GAUGE = "stillhouse_edge_process_resident_memory_bytes"  # of the one process with all its models
QUEUE_HISTOGRAM = "request_queue_time_seconds"  # after stillhouse_ or vllm:

# One sample line of the Prometheus text format: name{label="value",…} number
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class QueueTime:
    """A Prometheus histogram of seconds in the queue, at one moment: counts below each bound, over all versions."""

    total_s: float = 0.0
    count: float = 0.0
    below: dict[float, float] = field(default_factory=dict)

    def since(self, earlier: QueueTime) -> QueueTime:
        below = {bound: count - earlier.below.get(bound, 0.0) for bound, count in self.below.items()}
        return QueueTime(self.total_s - earlier.total_s, self.count - earlier.count, below)

    def plus(self, other: QueueTime) -> QueueTime:
        """Both together: of another time, or of another server."""
        bounds = self.below.keys() | other.below.keys()
        below = {bound: self.below.get(bound, 0.0) + other.below.get(bound, 0.0) for bound in bounds}
        return QueueTime(self.total_s + other.total_s, self.count + other.count, below)

    @property
    def mean_ms(self) -> float:
        return 1e3 * self.total_s / self.count if self.count > 0 else math.nan

    def percentile_ms(self, percent: float) -> float:
        """Interpolated within its bucket, as Prometheus' histogram_quantile does; NaN where nothing waited."""
        if self.count <= 0 or not self.below:
            return math.nan
        rank, low, before = self.count * percent / 100, 0.0, 0.0
        for bound, count in sorted(self.below.items()):
            if count >= rank:
                if math.isinf(bound) or count == before:
                    return 1e3 * low
                return 1e3 * (low + (bound - low) * (rank - before) / (count - before))
            low, before = bound, count
        return 1e3 * low


def read_page(metrics_url: str, api_key: str = "") -> str | None:
    """The metrics page; None where there is none."""
    try:
        request = urllib.request.Request(metrics_url)
        if api_key:
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")
        with urllib.request.urlopen(request, timeout=2.0) as response:
            return str(response.read().decode("utf-8", errors="replace"))
    except (urllib.error.URLError, OSError, ValueError):
        return None


def gauge_of(page: str, model: str) -> int | None:
    """The resident memory of the model's process, the largest where versions have one each; None where unknown."""
    values = [
        int(value)
        for name, labels, value in _lines(page)
        if name == EDGE_MEMORY_GAUGE or (name == MEMORY_GAUGE and _is_of(labels, model))
    ]
    return max(values, default=None)


def is_gateways(page: str) -> bool:
    """Whether the page is our gateway's, which stands before a Triton; an edge server tells of itself too."""
    names = {name for name, _, _ in _lines(page)}
    return any(name.startswith("stillhouse_gateway_") for name in names) and EDGE_MEMORY_GAUGE not in names


def queue_of(page: str, model: str) -> QueueTime | None:
    """The queue's histogram of a model; None where the page has none."""
    total_s, count, found = 0.0, 0.0, False
    below: dict[float, float] = {}
    for name, labels, value in _lines(page):
        base, _, part = name.rpartition("_")
        if base.endswith(QUEUE_HISTOGRAM) and _is_of(labels, model):
            found = True
            if part == "sum":
                total_s += value
            elif part == "count":
                count += value
            elif part == "bucket":
                bound = float(labels["le"])
                below[bound] = below.get(bound, 0.0) + value
    return QueueTime(total_s, count, below) if found else None


def version_size_bytes(repository: Path, model: str, version: str) -> int | None:
    """The sum of the files in a version's directory; None where the repository does not have it."""
    directory = repository / model / version
    if not directory.is_dir():
        return None
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _lines(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in page.splitlines():
        match = _LINE.match(line)
        if match:
            try:
                yield match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"])
            except ValueError:
                continue


def _is_of(labels: dict[str, str], model: str) -> bool:
    return labels.get("model_name") == model
