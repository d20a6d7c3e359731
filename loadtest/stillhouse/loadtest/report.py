"""Summaries as a table for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillhouse.loadtest.samples import Summary


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return " | ".join(cells).rstrip()

    rule = "-+-".join("-" * w for w in widths)
    return "\n".join([line(table[0]), rule, *(line(row) for row in table[1:])])


def number(value: float, digits: int = 0) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def token_table(summaries: Sequence[Summary]) -> str:
    """Tokens a second and the latencies that Locust's own columns do not have."""
    header = ["model", "answers", "failed", "tokens/s", "tokens/answer"]
    header += [f"{name} {p} ms" for name in ("TTFT", "ITL", "E2E") for p in ("p50", "p95")]
    rows = []
    for s in summaries:
        row = [s.model, str(s.requests), str(sum(s.failures.values()))]
        row += [number(s.tokens_per_s, 1), number(s.tokens_per_answer, 1)]
        for spread in (s.ttft, s.itl, s.e2e):
            row += [number(spread.p50_ms, 1), number(spread.p95_ms, 1)]
        rows.append(row)
    lines = [align(header, rows)]
    lines += [
        f"{s.model}: failed: " + ", ".join(f"{kind} {n}" for kind, n in sorted(s.failures.items()))
        for s in summaries
        if s.failures
    ]
    if any(not s.counted_by_server for s in summaries):
        lines.append("this server does not count tokens: every response is counted as one")
    return "\n".join(lines)


def write_csv(path: Path, summaries: Sequence[Summary]) -> None:
    """One row a model; times in milliseconds where a column says so."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for i, row in enumerate(_flat(s) for s in summaries):
            if i == 0:
                writer.writerow(row)
            writer.writerow(row.values())


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _flat(summary: Summary) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in asdict(summary).items():
        if name == "failures":
            row["failures"] = sum(value.values())
        elif isinstance(value, dict):
            row |= {f"{name}_{key}": "" if math.isnan(v) else round(v, 3) for key, v in value.items()}
        else:
            row[name] = round(value, 3) if isinstance(value, float) else value
    return row
