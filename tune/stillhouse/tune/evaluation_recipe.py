"""[evaluate] of a recipe: what is measured by, and the gate, which a fine-tune must hold against the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.build.recipe import EvaluateOptions, Recipe, load_recipe
from stillhouse.build.tables import read_tables
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.settings import load_tune_recipe
from stillhouse.tune.splits import find_split

# What a figure is measured on: a key of [evaluate].
_NEEDS = {
    "records_perplexity": "records",
    "exact_match_accuracy": "tasks",
    "multiple_choice_accuracy": "tasks",
    "tasks_accuracy": "tasks",
    "general_perplexity": "general",
    "general_tasks_accuracy": "general_tasks",
}
_FORMS = ("exact_match_accuracy", "multiple_choice_accuracy")


def load_evaluation(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `changes` made (build/tables.py).

    Held-out records that it does not name are [tune]'s test split, else its validation split.
    """
    recipe = load_recipe(path, changes)
    if recipe.evaluate.records is not None or "tune" not in read_tables(path, changes):
        return recipe
    options = load_tune_recipe(path, changes).tune
    named = [getattr(options, split) for split in ("test", "validation")]
    if options.data is not None:
        named = [find_split(Path(options.data), split) for split in ("test", "validation")]
    records = next((str(file) for file in named if file is not None), None)
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"records": records})})


def refuse_unmeasured(recipe: Recipe, *, records_follow: bool = False) -> None:
    """Raises UsageError for a gate that nothing will be measured for; `records_follow`: they are yet to be made."""
    asked = recipe.evaluate
    if (asked.better or asked.not_worse) and not recipe.adapters:
        raise UsageError(
            "[evaluate] better and not_worse hold a fine-tune against its base, and there is none",
            hint='name it: adapters = ["…"]',
        )
    for figure in (*asked.better, *asked.not_worse):
        needs = _NEEDS.get(figure)
        if needs is not None and getattr(asked, needs) is None and not (records_follow and needs == "records"):
            raise UsageError(f"[evaluate] gates {figure}, but names no {needs}", hint=f'{needs} = "….jsonl"')


def failures(changes: dict[str, Any], asked: EvaluateOptions) -> list[str]:
    """The figures that do not hold, by their key in `changes`: what became of each figure against the base."""
    better = [key for figure in asked.better if not _moved(key := _key_of(figure, changes), changes, to_better=True)]
    worse = [key for figure in asked.not_worse if _moved(key := _key_of(figure, changes), changes, to_better=False)]
    return list(dict.fromkeys(better + worse))


def _key_of(figure: str, changes: dict[str, Any]) -> str:
    key = figure.replace("_perplexity", "_perplexity_ratio")
    if key not in changes and figure == "tasks_accuracy":  # of tasks of one form, that form's accuracy is all there is
        key = next((form for form in _FORMS if form in changes), key)
    if key not in changes:
        raise StillhouseError(f"gate: {figure} was not measured", hint=f"measured: {', '.join(changes)}")
    return key


def _moved(key: str, changes: dict[str, Any], *, to_better: bool) -> bool:
    """Whether a figure went up or down by more than chance; of perplexities, less is better."""
    found = changes[key]
    went_better = found["value"] < 1 if key.endswith("_ratio") else found["value"] > 0
    return found["more_than_chance"] is True and went_better is to_better
