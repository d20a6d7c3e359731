"""Duplicates, exact and near, and the groups of what is alike."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.records import Record, answer_of, prompt_of
from stillhouse.tune.signatures import alike, jaccard, plain, shingles, write_signatures
from stillhouse.tune.store import Store

_REMEMBERED = 4096


class ShingleSets:
    """The shingles of records' texts, read and cut when they are asked for; the latest few thousand are kept."""

    def __init__(self, store: Store, text: Callable[[Record], str], length: int) -> None:
        self._store, self._text, self._length = store, text, length
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __getitem__(self, number: int) -> NDArray[Any]:
        found = self._kept.pop(number, None)
        if found is None:
            found = shingles(self._text(self._store[number]), self._length)
            if len(self._kept) >= _REMEMBERED:
                self._kept.popitem(last=False)
        self._kept[number] = found
        return found

    def similarity(self, one: int, other: int) -> float:
        return jaccard(self[one], self[other])


def text_of(record: Record) -> str:
    """Prompt and answer: what two records are compared by."""
    return f"{prompt_of(record)}\n{answer_of(record)}"


def drop_exact(store: Store) -> None:
    """Drops every record whose text, but for case, spaces and marks, an earlier one has."""
    seen: dict[bytes, int] = {}
    for number, record in store.living():
        first = seen.setdefault(_digest(text_of(record)), number)
        if first != number:
            store.drop(number, "exact duplicates", "the same text as another record", same_as=store[first]["source"])


def drop_near(store: Store, options: Duplicates, folder: Path) -> list[tuple[int, int]]:
    """Drops what is at least `near` like an earlier record that is kept; pairs at least `group` alike of the rest.

    The similarity is the exact Jaccard similarity of the shingles; the signatures only say which pairs to look at.
    """
    threshold = min(options.near, options.group)
    sets = ShingleSets(store, text_of, options.shingle)
    keeper: dict[int, int] = {}
    close: list[tuple[int, int]] = []
    for one, other in _candidates(store, text_of, options, threshold, folder / "texts.u4"):
        if not store.alive(other):
            continue
        kept = keeper.get(one, one)
        similarity = sets.similarity(kept, other)
        if similarity >= options.near < 1:
            keeper[other] = kept
            reason = f"{similarity:.3f} like another record (near-duplicates: {options.near:g} or more)"
            store.drop(other, "near-duplicates", reason, similarity=round(similarity, 4), same_as=store[kept]["source"])
        elif similarity >= options.group:
            close.append((kept, other))
    return close


def same_prompts(store: Store, options: Duplicates, folder: Path) -> Iterator[tuple[int, int]]:
    """Pairs of records whose prompts are the same, or at least `near` alike (where that is on)."""
    seen: dict[bytes, int] = {}
    for number, record in store.living():
        first = seen.setdefault(_digest(prompt_of(record)), number)
        if first != number:
            yield first, number
    if options.near >= 1:
        return
    sets = ShingleSets(store, prompt_of, options.shingle)
    for one, other in _candidates(store, prompt_of, options, options.near, folder / "prompts.u4"):
        if sets.similarity(one, other) >= options.near:
            yield one, other


def groups_of(count: int, pairs: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> list[int]:
    """The smallest number of each number's group, where `pairs` are in one group (union-find with path halving)."""
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [root(number) for number in range(count)]


def _candidates(
    store: Store, text: Callable[[Record], str], options: Duplicates, threshold: float, file: Path
) -> Iterator[tuple[int, int]]:
    """Numbers of living records that are likely at least `threshold` alike, the later one rising."""
    numbers: list[int] = []

    def cut() -> Iterator[NDArray[Any]]:
        for number, record in store.living():
            numbers.append(number)
            yield shingles(text(record), options.shingle)

    signatures = write_signatures(cut(), file, options.permutations)
    for one, other in alike(signatures, threshold):
        yield numbers[one], numbers[other]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(plain(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()
