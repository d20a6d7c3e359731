"""Summaries as a table for people, and as CSV and JSON for programs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillhouse.loadtest.tally import Summary, Verdict
from stillhouse.loadtest.timeline import Step

STEP_HEADER = ("load", "tokens/s", "TTFT p95 ms", "ITL p95 ms")


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
    return "-" if not math.isfinite(value) else f"{value:.{digits}f}"


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
    lines += [f"{s.model}: failed: {s.failures_said}" for s in summaries if s.failures]
    lines += [line for s in summaries for line in _more(s)]
    if any(not s.counted_by_server for s in summaries):
        lines.append("this server does not count tokens: every response is counted as one, or --tokenizer counts")
    return "\n".join(lines)


def step_table(steps: Sequence[Step]) -> str:
    """load | throughput | latencies, a row a stage."""
    return align(STEP_HEADER, [step_cells(step) for step in steps])


def step_cells(step: Step) -> list[str]:
    s = step.summary
    return [step.label, number(s.tokens_per_s, 1), number(s.ttft.p95_ms, 1), number(s.itl.p95_ms, 1)]


def _more(summary: Summary) -> list[str]:
    """What not every run has: thoughts before the answer, an objective."""
    lines = []
    answer = summary.answer
    if summary.with_thoughts:
        lines.append(f"{summary.model}: first answer token p50 {answer.p50_ms:.1f} ms, p95 {answer.p95_ms:.1f} ms")
    if summary.count_check is not None:
        lines.append(f"{summary.model}: {summary.count_check}")
    if summary.verdicts:
        said = ", ".join(f"{v.limit} {'met' if v.met else 'MISSED'} ({_valued(v)})" for v in summary.verdicts)
        lines.append(f"{summary.model}: {said}; goodput {number(summary.goodput_per_s or 0.0, 2)} requests/s")
    return lines


def _valued(verdict: Verdict) -> str:
    unit = "%" if verdict.limit.startswith("errors") else " ms"
    if math.isnan(verdict.value):
        return "not measured"
    return f"{verdict.value:.1f}{unit}" if math.isfinite(verdict.value) else "some never came"


def write_csv(path: Path, summaries: Sequence[Summary]) -> None:
    """One row a model."""
    write_rows(path, [csv_row(summary) for summary in summaries])


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows of the same columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([*(list(row) for row in rows[:1]), *(row.values() for row in rows)])


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def csv_row(summary: Summary) -> dict[str, Any]:
    """The figures by their column; times in milliseconds where it says so."""
    row: dict[str, Any] = {}
    for name, value in asdict(summary).items():
        if name == "failures":
            row["failures"] = sum(value.values())
        elif name == "verdicts":
            row["slo_met"] = "" if not value else summary.slo_met
        elif name == "count_check":
            row["counts_checked"] = value["answers"] if value else ""
            row["counts_disagreeing"] = value["disagreeing"] if value else ""
        elif isinstance(value, dict):
            row |= {f"{name}_{key}": "" if math.isnan(v) else round(v, 3) for key, v in value.items()}
        elif value is None:
            row[name] = ""
        else:
            row[name] = round(value, 3) if isinstance(value, float) else value
    return row
