"""Groups of records that are never split apart: what is alike, has one prompt, or is called a group by the recipe."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.own_texts import Own
from stillhouse.tune.signatures import plain
from stillhouse.tune.sketches import Sketches
from stillhouse.tune.store import Store


class Groups:
    """Numbers below `count` that are joined into groups (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, number: int) -> int:
        """The smallest number of its group."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> list[int]:
        """The smallest number of each number's group."""
        return [self.root(number) for number in range(len(self._parent))]


def groups_of(store: Store, texts: Sketches, own: Own, options: Duplicates, folder: Path) -> list[int]:
    """The group of every record by number: the smallest number in it. `texts` are the sketches of `own.text`."""
    groups = Groups(len(store))
    first: dict[bytes, int] = {}
    for number, record in store.living():
        keys = [b"prompt" + _digest(plain(own.prompt(record)))]
        if "group" in record:
            keys.append(b"group" + _digest(record["group"]))
        for key in keys:
            groups.join(first.setdefault(key, number), number)
    join_alike(groups, store, texts, options.group)
    if options.near < 1:
        prompts = ((number, own.prompt(record)) for number, record in store.living())
        join_alike(groups, store, Sketches(prompts, options, folder / "prompts"), options.near)
    return groups.roots()


def join_alike(groups: Groups, store: Store, texts: Sketches, threshold: float) -> None:
    """Joins living records whose texts are at least `threshold` alike; those that are joined are not compared again."""
    rows = np.flatnonzero([store.alive(number) for number in texts.numbers])
    for pairs in texts.neighbours(threshold, rows):
        roots = np.array([groups.root(number) for number in texts.numbers], dtype=np.int64)
        apart = pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]]
        for one, other in texts.likely(apart, threshold).tolist():
            numbers = texts.numbers[one], texts.numbers[other]
            if groups.root(numbers[0]) != groups.root(numbers[1]) and texts.similarity(one, other) >= threshold:
                groups.join(*numbers)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
