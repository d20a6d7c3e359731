"""`stillhouse data prepare`: from raw records to a numbered, immutable dataset, or to one line that says why not.

    read, check, mask ─▶ filters ─▶ duplicates ─▶ contamination ─▶ synthetic ─▶ perplexity ─▶ split ─▶ balance ─▶ write

A dataset is made in a folder `.new-…` beside its versions and renamed to its number at the end.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.build.locks import clear_unheld, held_temporary
from stillhouse.build.progress import Reporter
from stillhouse.engine.directory import locked, sha256_of, version_numbers
from stillhouse.engine.durable import sync_directory
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_inputs import inputs_of, portable, sources_of
from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.intake import Read
from stillhouse.tune.screening import screen
from stillhouse.tune.steps import Steps
from stillhouse.tune.writing import write_cards, write_dataset

CARD = "dataset.json"
TEMPORARY = ".new-"
_KEPT_OF_A_FAILURE = ("rejects.jsonl", "removed.jsonl")
_STEPS = 9


@dataclass(frozen=True, slots=True)
class Prepared:
    """Where a dataset lies, whether this call made it, and its card (dataset.json)."""

    path: Path
    new: bool
    card: dict[str, Any]


def prepare(
    recipe: DataRecipe, output: Path, reporter: Reporter, *, force: bool = False, journal: Path | None = None
) -> Prepared:
    """Makes the next version of `output`/`recipe.name`, or finds the one that the same inputs made.

    What an endpoint answers is kept in the folder `journal`, by default beside the versions.

    Raises StillhouseError where a source or the recipe is wrong, nothing is left, or the disk is full; then there is no
    new version, and rejects.jsonl and removed.jsonl beside the versions say what was rejected and dropped until then.
    """
    parent = output / recipe.name
    sources = sources_of(recipe)
    inputs = key_of(inputs_of(recipe, sources))
    with _sentences(parent):
        parent.mkdir(parents=True, exist_ok=True)
        if journal is not None:
            journal.mkdir(parents=True, exist_ok=True)
        clear_unheld(parent, TEMPORARY)
        same = None if force else find_same(parent, inputs)
        if same is not None:
            return same
        with held_temporary(parent, TEMPORARY) as folder, _kept_of_a_failure(folder, parent):
            work = folder / ".work"
            work.mkdir()
            steps = Steps(reporter, _STEPS)
            with screen(recipe, folder, work, journal or parent, steps) as screened:
                figures, pictures = write_dataset(recipe, screened, folder, steps)
            shutil.rmtree(work)
            card = {
                "schema": 1,
                "name": recipe.name,
                "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "inputs_sha256": inputs,
                "seed": recipe.seed,
                "recipe": portable(recipe),
                "sources": [source | _counts(source["path"], screened.read) for source in sources],
                **figures,
            }
            return _publish(folder, parent, card, pictures)


def find_same(parent: Path, inputs: str) -> Prepared | None:
    """The newest version that was made from the same inputs and is whole."""
    for number in reversed(version_numbers(parent)):
        path = parent / str(number)
        with contextlib.suppress(OSError, ValueError, KeyError):
            card = json.loads((path / CARD).read_text("utf-8"))
            whole = all(sha256_of(path / split["file"]) == split["sha256"] for split in card["splits"].values())
            if card["inputs_sha256"] == inputs and whole:
                return Prepared(path, False, card)
    return None


def _publish(folder: Path, parent: Path, card: dict[str, Any], pictures: list[str]) -> Prepared:
    with locked(parent):
        card["version"] = max(version_numbers(parent), default=0) + 1
        write_cards(folder, card, pictures)
        sync_directory(folder)
        path = parent / str(card["version"])
        folder.rename(path)
        sync_directory(parent)
    for name in _KEPT_OF_A_FAILURE:  # an earlier run's, which is mended now
        (parent / name).unlink(missing_ok=True)
    return Prepared(path, True, card)


def _counts(label: str, read: Read) -> dict[str, int]:
    counts = read.get(label, Counter())
    return {"records": counts["records"], "rejected": counts["rejected"]}


@contextlib.contextmanager
def _kept_of_a_failure(folder: Path, parent: Path) -> Iterator[None]:
    """What was rejected and dropped outlives a run that failed."""
    try:
        yield
    except StillhouseError:
        for name in _KEPT_OF_A_FAILURE:
            if (folder / name).is_file() and (folder / name).stat().st_size:
                shutil.copyfile(folder / name, parent / name)
        raise


@contextlib.contextmanager
def _sentences(parent: Path) -> Iterator[None]:
    """The system's errors become a line; a folder that holds nothing does not stay behind."""
    try:
        yield
    except OSError as error:
        if error.filename and not str(error.filename).startswith(str(parent.parent)):
            raise StillhouseError(f"cannot read {error.filename}: {error.strerror}", hint="is it yours?") from error
        raise StillhouseError(
            f"cannot write the dataset into {parent}: {error.strerror or error}",
            hint="free some disk space, or name another folder with --output; versions that were there are whole",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            parent.rmdir()
