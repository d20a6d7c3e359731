"""`stillhouse evaluate` for the command line; heavy libraries are imported when it runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

log = logging.getLogger(__name__)

_NAMES = {
    "records_perplexity": "perplexity, held-out answers",
    "exact_match_accuracy": "exact match",
    "multiple_choice_accuracy": "multiple choice",
    "tasks_accuracy": "all tasks",
    "answer_tokens": "tokens an answer",
    "general_perplexity": "perplexity, general answers",
    "general_tasks_accuracy": "general tasks",
    "text_perplexity": "perplexity, general text",
}
_VERDICTS = {True: "more than chance", False: "may be chance", None: "too few to tell"}


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml, with a table [evaluate].")],
    repository: Annotated[Path, typer.Option(help="The model repository whose versions are measured too.")] = Path(
        "model_repository"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Measure base, fine-tune and every built precision, and say what of the difference is more than chance.

    Example: stillhouse evaluate recipe.toml
    """
    from stillhouse.tune.quiet import hush

    hush()
    from stillhouse.tune.evaluation import evaluate as run
    from stillhouse.tune.evaluation import figures, load_evaluation

    done = run(load_evaluation(recipe), repository, on_model=lambda name: log.info("measuring: %s", name))
    rows = figures(done)
    if as_json:
        print(json.dumps({"asked": done.labels, "models": rows}, indent=2))
        return
    from stillhouse.build.report import print_table

    print_table(figures_table(rows))
    print("figure [its 95 % interval]; what was asked: " + ", ".join(f"{k} {v}" for k, v in done.labels.items()))
    for row in rows[1:]:
        for line in change_lines(row):
            print(line)


def figures_table(rows: list[dict[str, Any]]) -> Any:
    """A column a model, a line a figure."""
    from rich.table import Table

    table = Table("", *(row["model"] for row in rows))
    for key, name in _NAMES.items():
        if key in rows[0]:
            table.add_row(name, *(_cell(key, row[key]) for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _cell(key: str, found: dict[str, float]) -> str:
    if key.endswith("_accuracy"):
        return f"{100 * found['value']:.1f}% [{100 * found['low']:.0f}–{100 * found['high']:.0f}]"
    from stillhouse.tune.stats import LEAST

    digits = 1 if key == "answer_tokens" else 2
    if found["count"] < LEAST:  # resampled, so few have no interval worth the name
        return f"{found['value']:.{digits}f} (of {found['count']})"
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}–{found['high']:.{digits}f}]"


def change_lines(row: dict[str, Any]) -> list[str]:
    """What changed against the model that this one is held against, a line a figure, with its verdict."""
    lines = [f"{row['model']} against {row['against']}:"]
    for key, found in row["change"].items():
        name = _NAMES[key.removesuffix("_ratio")]
        verdict = _VERDICTS[found["more_than_chance"]]
        if key.endswith("_ratio"):
            what = f"× {found['value']:.4f} [{found['low']:.4f}–{found['high']:.4f}]"
        elif key.endswith("_accuracy"):
            interval = f"[{100 * found['low']:+.1f} … {100 * found['high']:+.1f}]"
            what = f"{100 * found['value']:+.1f} points {interval}, McNemar p = {found['mcnemar_p']:.3g}"
        else:
            what = f"{found['value']:+.1f} [{found['low']:+.1f} … {found['high']:+.1f}]"
        lines.append(f"  {name}: {what}: {verdict}")
    if row["gate"]:
        lines.append(f"  below its gate: {row['gate']}")
    return lines
