"""Duplicates, exact and near."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.own_texts import Own
from stillhouse.tune.records import Record, text_of
from stillhouse.tune.signatures import jaccard, plain, shingles
from stillhouse.tune.sketches import Sketches
from stillhouse.tune.store import Store


def drop_exact(store: Store) -> None:
    """Drops every record whose text, but for case, spaces and marks, an earlier one has."""
    seen: dict[bytes, int] = {}
    for number, record in store.living():
        digest = hashlib.blake2b(plain(text_of(record)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = seen.setdefault(digest, number)
        if first != number:
            store.drop(number, "exact duplicates", "the same text as another record", same_as=store[first]["source"])


def drop_near(store: Store, own: Own, options: Duplicates, folder: Path) -> Sketches:
    """Drops what is at least `near` like an earlier record that is kept; the sketches of all texts, for the groups.

    The similarity is the exact Jaccard similarity of the shingles; the signatures only say which pairs to look at.
    """
    texts = Sketches(((number, own.text(record)) for number, record in store.living()), options, folder / "texts")
    pairs = texts.alike(options.near) if options.near < 1 else np.empty((0, 2), dtype=np.int64)
    rows, starts = np.unique(pairs[:, 1], return_index=True)
    keeper: dict[int, int] = {}
    for row, earlier in zip(rows.tolist(), np.split(pairs[:, 0], starts[1:]), strict=False):
        number = texts.numbers[row]
        kept = dict.fromkeys(keeper.get(one, one) for one in earlier.tolist())
        for other, similarity in texts.alike_to(row, kept, options.near):
            first = store[texts.numbers[other]]
            similarity = min(similarity, _whole_similarity(first, store[number], own, options.shingle))
            if similarity >= options.near:
                keeper[row] = other
                reason = f"{similarity:.3f} like another record (near-duplicates: {options.near:g} or more)"
                details = {"similarity": round(similarity, 4), "same_as": first["source"]}
                store.drop(number, "near-duplicates", reason, **details)
                break
    return texts


def _whole_similarity(one: Record, other: Record, own: Own, length: int) -> float:
    """That of the texts with what is shared; 1 where both share the same: then what is their own has been compared."""
    if own.shared(one) == own.shared(other):
        return 1.0
    return jaccard(shingles(text_of(one), length), shingles(text_of(other), length))
