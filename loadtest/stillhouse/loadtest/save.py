"""A run as three files: JSON with every sample, CSV with a row of figures for each load, HTML with pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.loadtest.compare import Compared
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.page import comparison_page, page, stage_steps
from stillhouse.loadtest.report import csv_row, write_json, write_rows
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.timeline import Step


def save_run(
    name: Path, result: LoadResult, steps: Sequence[Step] = (), capacity: dict[str, Any] | None = None
) -> None:
    """Writes name.json, name.csv and name.html; the folder is made.

    `steps` are the loads of a search for a capacity; without one they are the stages of the run's own shape.
    """
    steps = list(steps) or stage_steps(result)
    value = result.to_json()
    if steps:
        value["steps"] = [{"load": step.label, **step.summary.to_json()} for step in steps]
    rows = [{"load": step.label, **csv_row(step.summary)} for step in steps]
    if capacity is not None:
        value["capacity"] = capacity
    elif rows:
        rows = [{"load": "all", **csv_row(result.summary)}, *rows]
    _write(name, value, rows or [csv_row(result.summary)], page(result, steps))


def save_comparison(name: Path, compared: Sequence[Compared]) -> None:
    """Writes name.json, name.csv (a row a model) and name.html; the folder is made."""
    rows = [
        {"precision": one.precision, **csv_row(one.load.summary), "rounds": len(one.rounds)}
        | {"memory_bytes": one.load.memory_bytes, "size_bytes": one.size_bytes}
        for one in compared
    ]
    _write(name, [one.to_json() for one in compared], rows, comparison_page(compared))


def check_name(name: Path) -> None:
    """Makes the folder and tries to write there, so that a name that will not do is known before a run."""
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=name.parent):
            pass
    except OSError as error:
        raise BadInput(
            f"cannot write {name}: {error.strerror}", hint="--save NAME is a file's name without its ending"
        ) from None


def _write(name: Path, value: Any, rows: Sequence[dict[str, Any]], text: str) -> None:
    name.parent.mkdir(parents=True, exist_ok=True)
    write_json(_with(name, ".json"), value)
    write_rows(_with(name, ".csv"), rows)
    _with(name, ".html").write_text(text, encoding="utf-8")


def _with(name: Path, ending: str) -> Path:
    return name.with_name(name.name + ending)
