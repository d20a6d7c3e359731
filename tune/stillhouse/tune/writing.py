"""Writing: the records that are left become splits, a card and pictures in a folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.engine.durable import write_text
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.balance import check_labels, copies, weights
from stillhouse.tune.coverage import cover
from stillhouse.tune.data_pictures import draw_dataset
from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.dataset_files import write_split
from stillhouse.tune.records import Record, answer_of, prompt_of
from stillhouse.tune.screening import Screened
from stillhouse.tune.splitting import SPLITS, split
from stillhouse.tune.steps import Steps
from stillhouse.tune.store import Store

log = logging.getLogger(__name__)


def write_dataset(
    recipe: DataRecipe, screened: Screened, folder: Path, steps: Steps
) -> tuple[dict[str, Any], list[str]]:
    """Writes the splits and pictures into `folder`; the card's figures, and the pictures' names.

    Raises StillhouseError where the training split would be empty, or the classes cannot be balanced.
    """
    store = screened.store
    with steps.step("split"):
        splits = split(store, screened.groups, recipe.split, recipe.seed)
        labels = _train_labels(store, splits)
        counts = Counter(labels.values())
        check_labels(counts, recipe.balance)
    if "train" not in splits.values():
        raise StillhouseError(
            f"no record is left for training: {store.count()} in all", hint="more records, or a larger split.train"
        )
    method = recipe.balance.method
    added = copies(labels, recipe.balance, recipe.seed) if method == "oversample" else []
    by_label = weights(counts) if method == "weights" else {}
    keep = sorted({column for source in recipe.sources for column in source.keep})
    written = {}
    with steps.step("write"):
        for name in SPLITS:
            if name not in splits.values():  # an empty file would be no split
                if getattr(recipe.split, name):
                    log.warning("warning: no record falls to %s: too few records, or too few groups of them", name)
                continue
            records = _records(screened, splits, name, added if name == "train" else [], by_label)
            written[name] = write_split(name, records, folder, recipe.format, keep)
    with steps.step("coverage"):
        coverage = cover(store, splits, recipe.coverage, recipe.seed)
    card = {
        "measured_on": screened.measured,
        "stages": screened.stages,
        "splits": written,
        "groups": len({screened.groups[number] for number in splits}),
        "masked": screened.masked,
        "perplexity": screened.perplexity,
        "synthetic": screened.synthetic,
        "balance": {"method": method, "added": len(added), "weights": by_label},
        "coverage": coverage,
    }
    with steps.step("pictures"):
        pictures = draw_dataset(card, _lengths(store), folder / "plots")
    return card, pictures


def write_cards(folder: Path, card: dict[str, Any], pictures: list[str]) -> None:
    """Writes dataset.json and README.md."""
    import json

    from stillhouse.tune.dataset_card import readme

    write_text(folder / "dataset.json", json.dumps(card, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", readme(card, pictures))


def _records(
    screened: Screened, splits: dict[int, str], name: str, added: list[int], by_label: dict[str, float]
) -> Iterator[Record]:
    """The records of one split in their order, then those that are there once more."""
    store = screened.store
    for number, record in store.living():
        if splits[number] == name:
            yield _finished(record, screened.groups[number], by_label if name == "train" else {})
    for number in added:
        yield _finished(store[number], screened.groups[number], {}) | {"oversampled": True}


def _finished(record: Record, group: int, by_label: dict[str, float]) -> Record:
    weight = {"weight": round(by_label[record["label"]], 6)} if record.get("label") in by_label else {}
    return record | {"group": str(group)} | weight


def _train_labels(store: Store, splits: dict[int, str]) -> dict[int, str]:
    """The labels of the training records that have one, by number."""
    return {
        number: record["label"] for number, record in store.living() if splits[number] == "train" and "label" in record
    }


def _lengths(store: Store) -> dict[str, list[int]]:
    """Characters of all prompts and answers."""
    found: dict[str, list[int]] = {"prompt": [], "answer": []}
    for _, record in store.living():
        found["prompt"].append(len(prompt_of(record)))
        found["answer"].append(len(answer_of(record)))
    return found
