"""`stillhouse tune` for the command line; heavy libraries are imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.build.commands import Changes


def tune(
    recipe: Annotated[Path, typer.Argument(help="The recipe.toml, with a table tune.")],
    force: Annotated[bool, typer.Option(help="Train again, and replace the adapter that is there.")] = False,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Train a LoRA adapter on a dataset; after a kill, the same command goes on where it was.

    Example: stillhouse tune recipe.toml
    """
    from stillhouse.tune.quiet import hush

    hush()
    from stillhouse.tune.finetune import tune as run
    from stillhouse.tune.settings import load_tune_recipe

    done = run(load_tune_recipe(recipe, changes or ()), force=force)
    if done is None:  # one of several processes, not the first
        return
    output, card, made = done
    if as_json:
        print(json.dumps(card, indent=2))
        return
    if not made:
        print(f"{output}: made from the same inputs; nothing to do (--force trains again)")
        return
    for line in summary(card):
        print(line)
    print(f"adapter, card and curves: {output}")


def summary(card: dict[str, Any]) -> list[str]:
    """What a run came to, a line each."""
    from stillhouse.tune.card import target_lines

    lines = [f"{card['steps']} steps; the best was {card['best_step']}"]
    lines[0] += f" (ended early: {card['stopped']})" if card["stopped"] else ""
    for split, after in card["after"].items():
        before = card["before"][split]
        lines.append(
            f"{split}: perplexity {before['perplexity']:.3f} → {after['perplexity']:.3f}, "
            f"next token right {100 * before['accuracy']:.1f}% → {100 * after['accuracy']:.1f}%"
        )
    return lines + target_lines(card["targets"])
