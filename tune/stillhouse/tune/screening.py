"""Screening: the records of a recipe's sources, and what is left of them after every filter, with counts."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.contamination import drop_contaminated
from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.duplicates import drop_exact, drop_near
from stillhouse.tune.filters import FILTERS, drop_filtered
from stillhouse.tune.grouping import groups_of
from stillhouse.tune.intake import Read, take_in
from stillhouse.tune.measured import prompts_of, read_measured
from stillhouse.tune.own_texts import Own, own_of
from stillhouse.tune.personal import Masker
from stillhouse.tune.sketches import Sketches
from stillhouse.tune.source_files import label_of
from stillhouse.tune.steps import Steps
from stillhouse.tune.store import Store

log = logging.getLogger(__name__)


@dataclass
class Screened:
    """What is left, the group of every record by number, and what the card says of how it came to be."""

    store: Store
    read: Read
    measured: list[dict[str, Any]]
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
    rejects = folder / "rejects.jsonl"
    measured = read_measured(recipe, rejects)
    with Store(work, folder / "removed.jsonl") as store:
        masker = Masker(recipe.personal_data.mask)
        with steps.step("read"):
            read = take_in(recipe, store, rejects, masker)
        stages = [{"stage": "read", "before": _total(read, "records"), "after": len(store)}]
        screened = Screened(store, read, measured.files, stages)

        def stage(name: str, run: Callable[[], Any]) -> Any:
            before = store.count()
            with steps.step(name):
                result = run()
            again = ", again" if any(one["stage"] == name for one in stages) else ""
            stages.append({"stage": name + again, "before": before, "after": store.count()})
            _warn_of_half(name, before, store.count())
            if not store.count():
                raise StillhouseError(f"no record is left after the step {name!r}", hint=_why(stages))
            return result

        def sift(start: int = 0) -> tuple[Own, Sketches]:
            _filter(store, recipe, start, stages, steps)
            both = chain((record for _, record in store.living()), (one.record for one in measured.asked))
            own = own_of(both, recipe.duplicates, work)
            if recipe.duplicates.exact:
                stage("exact duplicates", lambda: drop_exact(store))
            texts: Sketches = stage("near-duplicates", lambda: drop_near(store, own, recipe.duplicates, work))
            if measured.asked:
                prompts = prompts_of(measured.asked, own)
                stage("contamination", lambda: drop_contaminated(store, prompts, own, recipe, work))
            return own, texts

        own, texts = sift()
        if recipe.synthetic:
            from stillhouse.tune.synthetic import add_synthetic

            start = len(store)
            made = stage("synthetic", lambda: add_synthetic(recipe, store, masker, journals))
            own, texts = sift(start)
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
            screened.groups = groups_of(store, texts, own, recipe.duplicates, work)
            _warn_of_one_group(store, screened.groups)
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
        _warn_of_half(name, before, after)
        before = after
    if not store.count():
        raise StillhouseError("no record passes the filters", hint=_why(stages))


def _warn_of_half(name: str, before: int, after: int) -> None:
    if after < before / 2:
        log.warning(
            "warning: the step %r drops %d of %d records; is that meant? removed.jsonl has each with its reason",
            name, before - after, before,
        )  # fmt: skip


def _warn_of_one_group(store: Store, groups: list[int]) -> None:
    largest = Counter(groups[number] for number in range(len(store)) if store.alive(number)).most_common(1)[0][1]
    if 2 < store.count() < 2 * largest:
        log.warning(
            "warning: %d of %d records are alike, or called a group, and go into one split; "
            "a larger duplicates.group tells more of them apart",
            largest, store.count(),
        )  # fmt: skip


def _total(read: Read, kind: str) -> int:
    return sum(counts[kind] for counts in read.values())


def _why(stages: list[dict[str, Any]]) -> str:
    lost = [f"{one['stage']} dropped {one['before'] - one['after']}" for one in stages if one["before"] > one["after"]]
    return "; ".join(lost) + "; removed.jsonl beside the versions says why"
