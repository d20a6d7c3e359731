"""Groups of records that are never split apart: what is alike, has one prompt, or is called a group by the recipe."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.joining import Groups, join_alike
from stillhouse.tune.own_texts import Own
from stillhouse.tune.signatures import plain
from stillhouse.tune.sketches import Sketches
from stillhouse.tune.store import Store


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
    join_alike(groups, texts, options.group, store.alive)
    if options.near < 1:
        prompts = ((number, own.prompt(record)) for number, record in store.living())
        join_alike(groups, Sketches(prompts, options, folder / "prompts"), options.near)
    return groups.roots()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
