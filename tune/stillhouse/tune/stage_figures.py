"""The key figures of each stage, out of what its command printed: rows for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.tune import stages
from stillhouse.tune.evaluate_commands import NAMES, cell, change_lines
from stillhouse.tune.stage_process import PRINTED
from stillhouse.tune.tune_commands import summary

Rows = list[list[str]]


def figures_of(kind: str, folder: Path) -> Rows:
    """Rows of cells, the first one their heading; none where the stage printed nothing."""
    file = folder / PRINTED
    text = file.read_text("utf-8") if file.is_file() else ""
    if kind in (stages.EVALUATE, stages.PRECISIONS) and not text and (folder / "evaluation.json").is_file():
        text = (folder / "evaluation.json").read_text("utf-8")
    if not text.strip():
        return []
    if kind not in _ROWS:
        return [["", ""], *([line, ""] for line in text.splitlines())]
    try:
        return _ROWS[kind](json.loads(text))
    except ValueError:  # it was stopped while it printed
        return []


def _data(card: dict[str, Any]) -> Rows:
    rows = [["step", "before", "after"]]
    rows += [[step["stage"], str(step["before"]), str(step["after"])] for step in card["stages"]]
    rows += [[f"records in {name}", "", str(split["records"])] for name, split in card["splits"].items()]
    rejected = sum(source["rejected"] for source in card["sources"])
    rows.append(["bad records, by file and line in rejects.jsonl", "", str(rejected)])
    if made := card["synthetic"]:
        rows += [[f"made-up records, of {made['asked']} asked for", "", str(made["kept"])]]
        rows += [["answers outside of the schema, asked for again", "", str(made["asked_again"])]]
        rows += [[f"tokens of {made['model']}", str(made["prompt_tokens"]), str(made["completion_tokens"])]]
        rows += [["what they cost", "", f"{made['cost']:g}"]]
    return rows


def _tune(card: dict[str, Any]) -> Rows:
    settings = ", ".join(f"{key} {card['settings'][key]}" for key in ("r", "learning_rate", "epochs", "batch_size"))
    lines = [*summary(card), f"settings: {settings}, seed {card['settings']['seed']}"]
    return [["", ""], *([line, ""] for line in lines)]


def _evaluate(found: dict[str, Any]) -> Rows:
    return _measured(found["models"])


def _prune(report: dict[str, Any]) -> Rows:
    return [*_measured(report["models"]), [report["verdict"], *[""] * len(report["models"])]]


def _measured(models: list[dict[str, Any]]) -> Rows:
    rows = [["", *(row["model"] for row in models)]]
    rows += [[name, *(cell(key, row[key]) for row in models)] for key, name in NAMES.items() if key in models[0]]
    changes = [line for row in models[1:] for line in change_lines(row)]
    return rows + [[line.strip(), *[""] * len(models)] for line in changes]


def _build(done: dict[str, Any]) -> Rows:
    with_tasks = any(each.get("task_accuracy_share") is not None for each in done["results"])
    tasks = ["tasks kept"] if with_tasks else []
    rows = [["model", "version", "MB", "perplexity ratio", "top-1", *tasks, "what happened"]]
    for each in done["results"]:
        live = "" if each["version"] is None or each["version"] in each["live"] else ", not live"
        share = each.get("task_accuracy_share")
        rows.append(
            [
                each["model"],
                str(each["version"] or "–"),
                f"{each['bytes'] / 1e6:.1f}",
                f"{each['perplexity_ratio']:.4f}",
                f"{100 * each['top1_agreement']:.1f}%",
                *([("–" if share is None else f"{100 * share:.1f}%")] if with_tasks else []),
                each["status"] + live + (f": {each['reason']}" if each["reason"] else ""),
            ]
        )
    return rows


_ROWS = {
    stages.DATA: _data,
    stages.TUNE: _tune,
    stages.EVALUATE: _evaluate,
    stages.PRUNE: _prune,
    stages.BUILD: _build,
    stages.PRECISIONS: _evaluate,
}
