"""Screening: the records of a recipe's sources, and what is left of them after every filter, with counts."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.contamination import drop_contaminated, read_measured
from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.duplicates import drop_exact, drop_near, groups_of, same_prompts
from stillhouse.tune.filters import FILTERS, drop_filtered
from stillhouse.tune.intake import Read, take_in
from stillhouse.tune.personal import Masker
from stillhouse.tune.readers import label_of
from stillhouse.tune.steps import Steps
from stillhouse.tune.store import Store


@dataclass
class Screened:
    """What is left, the group of every record by number, and what the card says of how it came to be."""

    store: Store
    read: Read
    stages: list[dict[str, Any]]
    groups: list[int] = field(default_factory=list)
    masked: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, Any] | None = None
    synthetic: dict[str, Any] | None = None


@contextlib.contextmanager
def screen(recipe: DataRecipe, folder: Path, work: Path, journals: Path, steps: Steps) -> Iterator[Screened]:
    """Reads and filters; removed.jsonl and rejects.jsonl are written into `folder`, what is passing into `work`.

    What an endpoint answered is kept in `journals`, beside the versions. Raises StillhouseError where nothing is left.
    """
    measured = read_measured(recipe)
    with Store(work, folder / "removed.jsonl") as store:
        masker = Masker(recipe.personal_data.mask)
        with steps.step("read"):
            read = take_in(recipe, store, folder / "rejects.jsonl", masker)
        stages = [{"stage": "read", "before": _total(read, "records"), "after": len(store)}]
        screened = Screened(store, read, stages)

        def stage(name: str, run: Callable[[], Any]) -> Any:
            before = store.count()
            with steps.step(name):
                result = run()
            again = ", again" if any(one["stage"] == name for one in stages) else ""
            stages.append({"stage": name + again, "before": before, "after": store.count()})
            if not store.count():
                raise StillhouseError(f"no record is left after the step {name!r}", hint=_why(stages))
            return result

        def sift(start: int = 0) -> list[tuple[int, int]]:
            _filter(store, recipe, start, stages, steps)
            if recipe.duplicates.exact:
                stage("exact duplicates", lambda: drop_exact(store))
            pairs: list[tuple[int, int]] = stage("near-duplicates", lambda: drop_near(store, recipe.duplicates, work))
            if measured:
                stage("contamination", lambda: drop_contaminated(store, measured, recipe, work))
            return pairs

        pairs = sift()
        if recipe.synthetic:
            from stillhouse.tune.synthetic import add_synthetic

            start = len(store)
            made = stage("synthetic", lambda: add_synthetic(recipe, store, masker, journals))
            pairs = sift(start)
            kept = sum(1 for _ in store.living(start))
            screened.synthetic = made | {"kept": kept}
        if recipe.perplexity and recipe.scoring_model:
            from stillhouse.tune.perplexity import drop_by_perplexity

            options, model = recipe.perplexity, recipe.scoring_model
            scored = stage(
                "perplexity", lambda: drop_by_perplexity(store, options, model, recipe.revision, steps.share)
            )
            screened.perplexity = {"model": label_of(model, recipe.folder), **scored}
        with steps.step("groups"):
            alike = [*pairs, *same_prompts(store, recipe.duplicates, work), *_asked_for(store)]
            screened.groups = groups_of(len(store), alike)
        screened.masked = dict(sorted(masker.found.items()))
        store.flush()
        yield screened


def _filter(store: Store, recipe: DataRecipe, start: int, stages: list[dict[str, Any]], steps: Steps) -> None:
    """Runs the filters of one record; each is a stage of its own in the counts."""
    before, dropped = store.count(), Counter(store.dropped)
    with steps.step("filters"):
        drop_filtered(store, recipe.filters, start)
    for name in FILTERS:
        after = before - (store.dropped[name] - dropped[name])
        stages.append({"stage": name + (", again" if start else ""), "before": before, "after": after})
        before = after
    if not store.count():
        raise StillhouseError("no record passes the filters", hint=_why(stages))


def _asked_for(store: Store) -> Iterator[tuple[int, int]]:
    """Pairs of records with the same value in the column that the recipe calls their group."""
    first: dict[str, int] = {}
    for number, record in store.living():
        if "group" in record:
            yield first.setdefault(record["group"], number), number


def _total(read: Read, kind: str) -> int:
    return sum(counts[kind] for counts in read.values())


def _why(stages: list[dict[str, Any]]) -> str:
    lost = [f"{one['stage']} dropped {one['before'] - one['after']}" for one in stages if one["before"] > one["after"]]
    return "; ".join(lost) + "; removed.jsonl beside the versions says why"
