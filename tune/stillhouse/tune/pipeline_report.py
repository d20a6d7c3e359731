"""The pipeline's report: one HTML file with a section a stage, every picture in it, that fetches nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from stillhouse.engine.durable import write_text
from stillhouse.tune.pipeline import Places
from stillhouse.tune.stage_figures import Rows, figures_of
from stillhouse.tune.stage_record import Outcome, Record
from stillhouse.tune.stages import Stage

REPORT = "report.html"
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --paper: #fff; --line: #e5e7eb; --quiet: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --paper: #111827; --line: #374151; --quiet: #9ca3af } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.5rem } p, code { color: var(--quiet) }
table { border-collapse: collapse }
td, th { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
.done { color: #059669 } .failed { color: #dc2626 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1rem }
figure { margin: 1rem 0 0; background: #fff; padding: .5rem } img { max-width: 100%; height: auto }
pre { overflow-x: auto; white-space: pre-wrap }
"""


def write_report(stages: Sequence[Stage], places: Places, record: Record) -> Path:
    """Writes report.html into the run's folder, of the last run: whole, or the one before stays."""
    file = places.run / REPORT
    beside = places.run / f".{REPORT}.new"
    write_text(beside, page(stages, places, record))
    beside.replace(file)
    return file


def page(stages: Sequence[Stage], places: Places, record: Record) -> str:
    """The report as HTML."""
    outcomes = {outcome.stage: outcome for outcome in record.last_run}
    title = html.escape(f"Pipeline of {places.recipe.name}: {places.run.name}")
    spent = sum(outcome.seconds or 0.0 for outcome in record.last_run if outcome.status in ("done", "failed"))
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    parts = [f"<h1>{title}</h1>", f"<p>{now}; this run took {spent:.0f} s</p>"]
    parts.append(_overview(record.last_run))
    parts += [_section(stage, outcomes[stage.name], places) for stage in stages if stage.name in outcomes]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>'


def _overview(outcomes: Sequence[Outcome]) -> str:
    rows = [["stage", "what happened", "seconds", "key"]]
    for each in outcomes:
        seconds = "" if each.seconds is None else f"{each.seconds:.1f}"
        rows.append([each.stage, each.status, seconds, (each.key or "")[:12]])
    return _table(rows)


def _section(stage: Stage, outcome: Outcome, places: Places) -> str:
    seconds = "" if outcome.seconds is None else f", {outcome.seconds:.1f} s"
    color = {"done": "done", "unchanged": "done", "failed": "failed"}.get(outcome.status, "")
    parts = [f'<h2>{html.escape(stage.name)}: <span class="{color}">{outcome.status}</span>{seconds}</h2>']
    parts += [f'<p class="failed">{html.escape(outcome.error)}</p>'] if outcome.error else []
    parts += [f"<p>why: {html.escape(outcome.why)}</p>"] if outcome.why else []
    if outcome.key is not None:
        folder = places.folder(stage.name, outcome.key)
        parts.append(_table(figures_of(stage.kind, folder)))
        found = [file for pattern in stage.pictures for file in sorted(folder.glob(pattern))]
        parts.append(f'<div class="pictures">{"".join(_picture(file) for file in found)}</div>' if found else "")
        parts.append(f"<p>key <code>{outcome.key}</code></p>")
    command = html.escape(" ".join(["stillhouse", *stage.arguments]))
    return "\n".join([*parts, f"<details><summary>command</summary><pre>{command}</pre></details>"])


def _picture(file: Path) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    source = f"data:{_TYPES[file.suffix]};base64,{content}"  # as an image, an SVG fetches nothing and runs nothing
    return f'<figure><img alt="{html.escape(file.stem)}" src="{source}"></figure>'


def _table(rows: Rows) -> str:
    """The first row is the heading; a row of which only the first cell says something goes over all columns."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0]) if any(rows[0]) else ""
    return f"<table><tr>{head}</tr>{''.join(_row(row) for row in rows[1:])}</table>"


def _row(row: list[str]) -> str:
    if not any(row[1:]):
        return f'<tr><td colspan="{len(row)}">{html.escape(row[0])}</td></tr>'
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
