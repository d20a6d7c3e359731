"""Train, validation and test: whole groups, within each label, the same ones for the same seed."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from stillhouse.tune.data_recipe import Split
from stillhouse.tune.store import Store

SPLITS = ("train", "validation", "test")


def split(store: Store, groups: list[int], options: Split, seed: int) -> dict[int, str]:
    """The split of every living record, by number; a group with a synthetic record is for training.

    Groups are taken in an order that the seed gives. Within each label (a group's is its most frequent one), they fill
    test, then validation, as nearly as they can; what one label has too few or too many of, those after it make up.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    labels: defaultdict[int, Counter[str]] = defaultdict(Counter)
    synthetic: set[int] = set()
    for number, record in store.living():
        group = groups[number]
        members[group].append(number)
        labels[group][record.get("label", "")] += 1
        if "synthetic" in record:
            synthetic.add(group)
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for group, counts in labels.items():
        strata[min(counts, key=lambda label: (-counts[label], label))].append(group)

    chosen: dict[int, str] = {}
    owed = {"test": 0.0, "validation": 0.0}
    for label in sorted(strata):
        total = sum(len(members[group]) for group in strata[label])
        left = [group for group in _shuffled(strata[label], seed) if group not in synthetic]
        for name, share in (("test", options.test), ("validation", options.validation)):
            owed[name] += share * total
            taken = _fitting(left, members, int(owed[name] + 0.5))
            owed[name] -= sum(len(members[group]) for group in taken)
            chosen.update(dict.fromkeys(taken, name))
            left = [group for group in left if group not in taken]
    return {number: chosen.get(group, "train") for group in sorted(members) for number in members[group]}


def _fitting(groups: Iterable[int], members: dict[int, list[int]], room: int) -> set[int]:
    """Groups in order, each of which brings their sum nearer to `room` records."""
    taken = set()
    for group in groups:
        if len(members[group]) < 2 * room:
            taken.add(group)
            room -= len(members[group])
    return taken


def _shuffled(groups: list[int], seed: int) -> list[int]:
    return sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
