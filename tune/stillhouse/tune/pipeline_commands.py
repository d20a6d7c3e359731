"""`stillhouse pipeline` for the command line; what is heavy is imported when it runs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stillhouse.engine.errors import StillhouseError

if TYPE_CHECKING:
    from stillhouse.tune.pipeline import Planned
    from stillhouse.tune.stage_record import Record


def pipeline(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml, with the tables tune, evaluate and perhaps data.")],
    repository: Annotated[Path, typer.Option(help="The model repository that the build publishes into.")] = Path(
        "model_repository"
    ),
    output: Annotated[Path, typer.Option(help="Where runs lie: OUTPUT/NAME.")] = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which stages would run and why; do nothing.")] = False,
    compile_to: Annotated[
        Path | None,
        typer.Option("--compile", metavar="FILE.yaml", help="Write a Kubeflow definition of the stages; run nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """From raw records to versions in a model repository: data, tune, evaluate, prune, build, precisions, promote.

    A stage runs where something that it reads has changed; a killed run goes on where it was; a failed gate stops it.

    Example: stillhouse pipeline examples/support/pipeline.toml
    """
    from stillhouse.build.recipe import load_recipe
    from stillhouse.tune import stages as table
    from stillhouse.tune.pipeline import Places, plan, run

    stages = table.stages_of(recipe, None if compile_to else repository)  # a cluster has a repository of its own
    name = load_recipe(recipe).name
    if compile_to is not None:
        from stillhouse.tune.kubeflow import compile_pipeline

        compile_pipeline(name, stages, recipe, table.pipeline_options(recipe), compile_to)
        print(f"{compile_to}: {', '.join(stage.name for stage in stages)}")
        return
    places = Places(recipe, output / name, repository)
    if dry_run:
        _say_plan(plan(stages, places), as_json)
        return
    from stillhouse.tune.pipeline_report import REPORT, write_report

    try:
        record = run(
            stages,
            places,
            on_end=lambda ended: write_report(stages, places, ended),
            again=lambda: table.stages_of(recipe, repository),
        )
    except StillhouseError:
        if (report := places.run / REPORT).is_file():
            print(f"report: {report}", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps([asdict(outcome) for outcome in record.last_run], indent=2))
    else:
        _show(record)
        print(f"report: {places.run / REPORT}")


def _show(record: Record) -> None:
    from rich.table import Table

    from stillhouse.build.report import print_table

    table = Table("stage", "what happened", "seconds", "why")
    for outcome in record.last_run:
        seconds = f"{outcome.seconds:.1f}" if outcome.seconds is not None and outcome.status == "done" else "–"
        table.add_row(outcome.stage, outcome.status, seconds, outcome.why or "")
    print_table(table)


def _say_plan(planned: list[Planned], as_json: bool) -> None:
    if as_json:
        rows = [{"stage": each.stage.name, "runs": each.why is not None, "why": each.why} for each in planned]
        print(json.dumps(rows, indent=2))
        return
    for each in planned:
        print(f"{each.stage.name}: " + ("unchanged" if each.why is None else f"would run: {each.why}"))
