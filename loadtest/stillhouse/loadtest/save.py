"""A run as three files: JSON with every sample, CSV with a row of figures, HTML with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.loadtest.page import page
from stillhouse.loadtest.report import write_csv, write_json
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.timeline import Step


def save_run(
    name: Path, result: LoadResult, steps: Sequence[Step] = (), capacity: dict[str, Any] | None = None
) -> None:
    """Writes name.json, name.csv and name.html; the folder is made."""
    name.parent.mkdir(parents=True, exist_ok=True)
    value = result.to_json()
    if capacity is not None:
        value["capacity"] = capacity
    write_json(_with(name, ".json"), value)
    write_csv(_with(name, ".csv"), [result.summary])
    _with(name, ".html").write_text(page(result, steps), encoding="utf-8")


def _with(name: Path, ending: str) -> Path:
    return name.with_name(name.name + ending)
