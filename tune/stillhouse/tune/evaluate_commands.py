"""`stillhouse evaluate` for the command line; heavy libraries are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.build.commands import Changes
from stillhouse.engine.errors import StillhouseError, UsageError

if TYPE_CHECKING:
    from stillhouse.build.recipe import EvaluateOptions

NAMES = {
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
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml, with a table evaluate.")],
    repository: Annotated[Path, typer.Option(help="The model repository whose versions are measured too.")] = Path(
        "model_repository"
    ),
    no_versions: Annotated[
        bool, typer.Option("--no-versions", help="Measure the base and the fine-tune alone, no built precision.")
    ] = False,
    built: Annotated[
        Path | None,
        typer.Option(
            help="A folder of 'build --output': the versions of that build, live or not, in place of the live ones.",
            show_default="none",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for evaluation.json and its picture.", show_default="none")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure every model again, whatever is cached.")
    ] = False,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Measure base, fine-tune and every built precision, and say what of the difference is more than chance.

    A model that was measured before by the same questions is not measured again: one that was killed goes on.
    Where the recipe has a gate ([evaluate] better, not_worse) that the fine-tune does not hold, the exit code is 1.

    Example: stillhouse evaluate recipe.toml
    """
    from stillhouse.tune.quiet import hush

    hush()
    from stillhouse.tune.built_versions import built_in, live_of
    from stillhouse.tune.evaluation import evaluate as run
    from stillhouse.tune.evaluation import figures
    from stillhouse.tune.evaluation_recipe import load_evaluation

    if built is not None and no_versions:
        raise UsageError("--built names versions to measure, --no-versions none", hint="give one of them")
    asked = load_evaluation(recipe, changes or ())
    versions = built_in(built) if built is not None else [] if no_versions else live_of(asked, repository)
    done = run(asked, versions, no_cache=no_cache)
    rows = figures(done)
    found = json.dumps({"asked": done.labels, "models": rows}, indent=2)
    if output is not None:
        from stillhouse.tune.evaluation_picture import draw_changes

        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(found + "\n", "utf-8")
        draw_changes(rows, NAMES, output)
    if as_json:
        print(found)
    else:
        _show(rows, done.labels)
    change: dict[str, Any] = next((row["change"] for row in rows if row["model"] == "tuned"), {})
    hold_gate("the fine-tune", change, asked.evaluate)


def _show(rows: list[dict[str, Any]], labels: dict[str, str]) -> None:
    from stillhouse.build.report import print_table

    print_table(figures_table(rows))
    print("figure [its 95 % interval]; what was asked: " + ", ".join(f"{k} {v}" for k, v in labels.items()))
    for row in rows[1:]:
        for line in change_lines(row):
            print(line)


def hold_gate(what: str, change: dict[str, Any], asked: EvaluateOptions) -> None:
    """Raises StillhouseError where `what`, changed so against the base, does not hold what the recipe asks for."""
    from stillhouse.tune.evaluation_recipe import failures

    if failed := failures(change, asked):
        raise StillhouseError(
            f"{what} does not hold its gate: {'; '.join(change_line(key, change[key]) for key in failed)}",
            hint="more or cleaner data, other [tune] settings, or another [evaluate] better, not_worse",
        )


def figures_table(rows: list[dict[str, Any]]) -> Any:
    """A column a model, a line a figure."""
    from rich.table import Table

    table = Table("", *(row["model"] for row in rows))
    for key, name in NAMES.items():
        if key in rows[0]:
            table.add_row(name, *(cell(key, row[key]) for row in rows))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def cell(key: str, found: dict[str, float]) -> str:
    """A figure and its interval."""
    if key.endswith("_accuracy"):
        return f"{100 * found['value']:.1f}% [{100 * found['low']:.0f}–{100 * found['high']:.0f}]"
    from stillhouse.tune.stats import LEAST

    digits = 1 if key == "answer_tokens" else 2
    cut = f", {found['cut']} cut" if found.get("cut") else ""
    if found["count"] < LEAST:  # resampled, so few have no interval worth the name
        return f"{found['value']:.{digits}f} (of {found['count']}{cut})"
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}–{found['high']:.{digits}f}]{cut}"


def change_lines(row: dict[str, Any]) -> list[str]:
    """What changed against the model that this one is held against, a line a figure, with its verdict."""
    lines = [f"{row['model']} against {row['against']}:"]
    for key, found in row["change"].items():
        lines.append(f"  {change_line(key, found)}")
    if row["gate"]:
        lines.append(f"  below its gate: {row['gate']}")
    return lines


def change_line(key: str, found: dict[str, Any]) -> str:
    """What became of one figure, its interval, and whether that is more than chance."""
    if key.endswith("_ratio"):
        what = f"× {found['value']:.4f} [{found['low']:.4f}–{found['high']:.4f}]"
    elif key.endswith("_accuracy"):
        interval = f"[{100 * found['low']:+.1f} … {100 * found['high']:+.1f}]"
        what = f"{100 * found['value']:+.1f} points {interval}, McNemar p = {found['mcnemar_p']:.3g}"
    else:
        what = f"{found['value']:+.1f} [{found['low']:+.1f} … {found['high']:+.1f}]"
    return f"{NAMES[key.removesuffix('_ratio')]}: {what}: {_VERDICTS[found['more_than_chance']]}"
