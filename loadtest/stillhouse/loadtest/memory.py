"""How large a model is: the resident memory that its server reports, and its version's files."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

MEMORY_GAUGE = "stillhouse_process_resident_memory_bytes"

# One sample line of the Prometheus text format: name{label="value",…} number
_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def read_memory_bytes(metrics_url: str, model: str) -> int | None:
    """The resident memory of the model's process, the largest where versions have one each; None where unknown."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=2.0) as response:
            page = response.read().decode("utf-8", errors="replace")
    except (urllib.error.URLError, OSError, ValueError):
        return None
    return gauge_of(page, model)


def gauge_of(page: str, model: str) -> int | None:
    values = []
    for line in page.splitlines():
        match = _LINE.match(line)
        if match and match["name"] == MEMORY_GAUGE:
            labels = dict(_LABEL.findall(match["labels"] or ""))
            if labels.get("model_name") == model:
                values.append(int(float(match["value"])))
    return max(values, default=None)


def version_size_bytes(repository: Path, model: str, version: str) -> int | None:
    """The sum of the files in a version's directory; None where the repository does not have it."""
    directory = repository / model / version
    if not directory.is_dir():
        return None
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
