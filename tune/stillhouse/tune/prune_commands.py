"""`stillhouse prune` for the command line; heavy libraries are imported when it runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.build.commands import Changes

log = logging.getLogger(__name__)


def prune(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml, with the table tune and perhaps prune.")],
    force: Annotated[bool, typer.Option(help="Replace the output that is there.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Measure every model again, whatever is cached.")
    ] = False,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Take out the attention heads and layers that matter least, heal by LoRA, and say what it was worth.

    Where the recipe has a gate ([evaluate] better, not_worse) that the healed model does not hold, the exit code is 1.

    Example: stillhouse prune recipe.toml
    """
    from stillhouse.tune.quiet import hush

    hush()
    from stillhouse.build.tables import read_tables
    from stillhouse.tune.evaluate_commands import NAMES, hold_gate
    from stillhouse.tune.evaluation_picture import draw_changes
    from stillhouse.tune.evaluation_recipe import load_evaluation
    from stillhouse.tune.prune import prune as run
    from stillhouse.tune.prune_options import prune_options
    from stillhouse.tune.settings import load_tune_recipe

    changed = changes or ()
    options = prune_options(read_tables(recipe, changed).get("prune", {}), recipe)
    asked = load_evaluation(recipe, changed)
    output, report = run(
        asked,
        load_tune_recipe(recipe, changed),
        options,
        force=force,
        no_cache=no_cache,
        on_stage=lambda name: log.info("pruning: %s", name),
    )
    draw_changes(report["models"], NAMES, output)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report, output)
    if "against_base" in report:
        hold_gate("the pruned model", report["against_base"], asked.evaluate)


def _show(report: dict[str, Any], output: Path) -> None:
    from stillhouse.build.report import print_table
    from stillhouse.tune.evaluate_commands import change_lines, figures_table

    rows = report["models"]
    table = figures_table(rows)
    for key, name, unit in _COSTS:
        table.add_row(name, *(f"{row['costs'][key] / unit:,.1f}" for row in rows))
    print_table(table)
    cut = report["cut"]
    print(f"heads: {100 * cut['heads_share']:.0f}% gone of {100 * cut['heads_asked']:.0f}% asked for; layers gone: "
          f"{', '.join(map(str, cut['layers'])) or 'none'}")  # fmt: skip
    for row in rows[1:]:
        for line in change_lines(row):
            print(line)
    print(report["verdict"])
    print(f"checkpoint and report: {output}")


_COSTS = (
    ("bytes", "weights, MB", 1e6),
    ("parameters", "parameters, millions", 1e6),
    ("kv_bytes_per_token", "KV cache, KB a token (FP32)", 1e3),
    ("prefill_tokens_per_s", "prefill, tokens/s (torch)", 1),
    ("decode_tokens_per_s", "decode, tokens/s (torch)", 1),
)
