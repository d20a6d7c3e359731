"""`stillhouse data` for the command line; what is heavy is imported when a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from stillhouse.tune.prepare import Prepared

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Turn raw records into a dataset to tune on.

    Example: stillhouse data prepare data.toml
    """


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    output: Annotated[Path, typer.Option(help="Where datasets lie: OUTPUT/NAME/VERSION.")] = Path("datasets"),
    force: Annotated[bool, typer.Option(help="Make a new version even where the same inputs have one.")] = False,
    journal: Annotated[
        Path | None, typer.Option(help="A folder that keeps what an endpoint answered; by default OUTPUT/NAME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON in place of a table.")] = False,
) -> None:
    """Read, check, clean, balance and split records into a versioned dataset.

    Example: stillhouse data prepare examples/support/data.toml --output datasets
    """
    from stillhouse.build.progress import reporter_for_terminal
    from stillhouse.tune.data_recipe import load_data_recipe
    from stillhouse.tune.prepare import prepare as run

    asked = load_data_recipe(recipe)
    with reporter_for_terminal() as reporter:
        done = run(asked, output, reporter, force=force, journal=journal)
    if as_json:
        print(json.dumps({"path": str(done.path), "new": done.new, **done.card}, indent=2, ensure_ascii=False))
    else:
        _show(done)


def _show(done: Prepared) -> None:
    from rich.table import Table

    from stillhouse.build.report import print_table

    card = done.card
    if done.new:
        table = Table("step", "before", "after", "dropped")
        for stage in card["stages"]:
            before, after = stage["before"], stage["after"]
            table.add_row(stage["stage"], str(before), str(after), str(max(before - after, 0) or "–"))
        print_table(table)
        for line in card["coverage"]["thin"][:10]:
            print(f"thin: {line}")
    else:
        print(f"the same inputs are version {card['version']}; nothing new (--force makes one)")
    sizes = ", ".join(f"{split['records']} {name}" for name, split in card["splits"].items())
    rejected = sum(source["rejected"] for source in (*card["sources"], *card.get("measured_on", [])))
    print(f"{sizes}; {rejected} bad records: {done.path / 'rejects.jsonl'}" if rejected else sizes)
    print(f"dataset: {done.path}")
