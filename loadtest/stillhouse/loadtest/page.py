"""The report: one HTML file that holds everything and fetches nothing."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from stillhouse.loadtest import plots
from stillhouse.loadtest.compare import Compared, comparison_cells, remarks
from stillhouse.loadtest.report import STEP_HEADER, number, step_cells
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.tally import Summary, summarize
from stillhouse.loadtest.timeline import Step, by_stage

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #e5e7eb; text-align: right }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
svg { width: 100%; height: auto } .bad { background: #fee2e2; padding: .6rem 1rem } .good { color: #047857 }
.missed { color: #b91c1c } figure { margin: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 2rem }
details pre { overflow-x: auto; background: #f3f4f6; padding: 1rem }
@media (prefers-color-scheme: dark) {
body { background: #111827; color: #e5e7eb } figure { background: #f9fafb }
.bad { color: #111827 } details pre { background: #1f2937 } }
"""


def page(result: LoadResult, steps: Sequence[Step] = ()) -> str:
    """The report of one run; `steps` are other levels of load, as of a capacity search, where there are some."""
    samples = samples_of(result)
    steps = list(steps) or stage_steps(result)
    title = f"{result.model}: {number(result.summary.tokens_per_s, 1)} tokens/s"
    parts = [
        f"<h1>Load test of {html.escape(title)}</h1>",
        _warnings(result),
        _figures(result.summary),
        _verdicts(result.summary),
    ]
    parts.append(_server(result))
    pictures = []
    if samples:
        pictures.append(_picture("Latency over time", plots.latency_over_time(samples)))
        if curves := _curves(result):
            pictures.append(_picture("Latency by percentile", plots.percentile_curves(curves)))
        pictures.append(_picture("Throughput, and what was under way", plots.throughput_over_time(samples)))
    if len(steps) > 1:
        pictures.append(_picture("Throughput against latency, by load", plots.throughput_against_latency(steps)))
    parts.append(f'<div class="plots">{"".join(pictures)}</div>')
    if len(steps) > 1:
        parts.append(_table("steps", STEP_HEADER, [step_cells(step) for step in steps]))
    parts.append(_settings(result))
    return _document(title, parts)


def comparison_page(compared: Sequence[Compared]) -> str:
    """The report of a comparison: its table, and how long whole answers took."""
    title = f"{', '.join(one.load.model for one in compared)}: side by side"
    curves = {one.precision: _curves(one.load).get("e2e", []) for one in compared}
    parts = [
        f"<h1>Load test of {html.escape(title)}</h1>",
        *(f'<p class="bad">{html.escape(line)}</p>' for line in remarks(compared)),
        _table("comparison", *comparison_cells(compared)),
        _picture("End to end by percentile", plots.percentile_curves(curves)),
        _settings(compared[0].load),
    ]
    return _document(title, parts)


def _document(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'
    )


def samples_of(result: LoadResult) -> list[Sample]:
    fields = result.details.get("sample_fields", [])
    return [Sample(**dict(zip(fields, row, strict=True))) for row in result.details.get("samples", [])]


def stage_steps(result: LoadResult) -> list[Step]:
    """A step for each stage of the load's shape in which requests started; none where it has no shape."""
    samples, shape = samples_of(result), result.load.shape
    if shape is None or not samples:
        return []
    unit = "users" if shape.in_users else "/s"
    zero_s = result.details.get("zero_s") or min(sample.start_s for sample in samples)
    return [
        Step(f"{(stage.begin + stage.end) / 2:g} {unit}", summary)
        for stage, part in zip(shape.stages, by_stage(samples, shape.stages, zero_s), strict=True)
        for summary in summarize(part, parse_slo(result.load.slo))
    ]


def _curves(result: LoadResult) -> dict[str, Any]:
    curves: dict[str, Any] = dict(result.details.get("curves", {}).get(result.model, {}))
    if not result.summary.with_thoughts:
        curves.pop("answer", None)
    return curves


def _warnings(result: LoadResult) -> str:
    lines = [f"This run is not valid: the load generator could not keep up; {problem}." for problem in result.problems]
    if result.interrupted:
        lines.append("Interrupted: the figures are of what came before.")
    if result.ended_early:
        lines.append(f"Ended before its time: {result.ended_early}. The figures are of what came before.")
    return "".join(f'<p class="bad">{html.escape(line)}</p>' for line in lines)


def _figures(s: Summary) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("ms", "mean", "p50", "p90", "p95", "p99", "max"))
    rows = []
    spreads = {"TTFT": s.ttft, "First answer token": s.answer, "Between tokens": s.itl, "End to end": s.e2e}
    if not s.with_thoughts:
        del spreads["First answer token"]
    for name, spread in spreads.items():
        values = (spread.mean_ms, spread.p50_ms, spread.p90_ms, spread.p95_ms, spread.p99_ms, spread.max_ms)
        rows.append(f"<tr><td>{name}</td>" + "".join(f"<td>{number(value, 1)}</td>" for value in values) + "</tr>")
    facts = (
        f"{s.requests} answers in {s.duration_s:.1f} s ({s.requests_per_s:.2f}/s), "
        f"{number(s.tokens_per_answer, 1)} tokens each; "
        f"{s.tokens_per_s:.1f} tokens/s in all, {number(s.tokens_per_s_per_user, 1)} a user; "
        f"failed: {s.failures_said or 'none'}; cut off by the end: {s.cut}."
    )
    if s.count_check is not None:
        facts += f" {s.count_check}."
    return f"<p>{html.escape(facts)}</p><table id='figures'><tr>{head}</tr>{''.join(rows)}</table>"


def _verdicts(s: Summary) -> str:
    if not s.verdicts:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(v.limit)}</td><td>{number(v.value, 1)}</td>"
        f"<td class='{'good' if v.met else 'missed'}'>{'met' if v.met else 'missed'}</td></tr>"
        for v in s.verdicts
    )
    said = f"{s.good} requests met it themselves: goodput {s.goodput_per_s or 0:.2f} requests/s."
    return f"<h2>Objective</h2><table id='slo'>{rows}</table><p>{said}</p>"


def _server(result: LoadResult) -> str:
    facts = []
    if result.queue is not None and not math.isnan(result.queue.mean_ms):
        facts.append(
            f"queue time mean {result.queue.mean_ms:.1f} ms, p95 {number(result.queue.percentile_ms(95), 1)} ms"
        )
    if result.memory_bytes is not None:
        facts.append(f"resident memory {result.memory_bytes / 1e9:.2f} GB")
    return f"<p>The server's own metrics: {', '.join(facts)}.</p>" if facts else ""


def _table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [("th", header), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in lines)
    return f"<table id='{name}'>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _settings(result: LoadResult) -> str:
    value = result.to_json()
    shown = {name: value.get(name) for name in ("settings", "environment", "client", "server", "protocol")}
    text = html.escape(json.dumps(shown, indent=2))
    return f"<h2>Settings, versions, machine</h2><details open><pre>{text}</pre></details>"


def _picture(title: str, svg: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><figure>{svg}</figure></section>"
