"""Duplicates, exact and near."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
    keeper: dict[int, int] = {}
    for one, row in texts.alike(options.near).tolist() if options.near < 1 else ():
        number = texts.numbers[row]
        if not store.alive(number):
            continue
        kept = keeper.get(one, one)
        similarity = texts.similarity(kept, row)
        if similarity < options.near:
            continue
        first = store[texts.numbers[kept]]
        similarity = min(similarity, _whole_similarity(first, store[number], own, options.shingle))
        if similarity >= options.near:
            keeper[row] = kept
            reason = f"{similarity:.3f} like another record (near-duplicates: {options.near:g} or more)"
            store.drop(number, "near-duplicates", reason, similarity=round(similarity, 4), same_as=first["source"])
    return texts


def _whole_similarity(one: Record, other: Record, own: Own, length: int) -> float:
    """That of the texts with what is shared; 1 where both share the same: then what is their own has been compared."""
    if own.shared(one) == own.shared(other):
        return 1.0
    return jaccard(shingles(text_of(one), length), shingles(text_of(other), length))
