"""What of a record is its own: a system's text, or an instruction, that many records share says nothing about any.

Behind one system prompt all chats are alike, and so are all inputs behind one instruction. Where records are compared,
such a text is left out, and counted as one more thing that two of them must have in common.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.joining import Groups, join_alike
from stillhouse.tune.records import Record, answer_of, prompt_of
from stillhouse.tune.signatures import plain
from stillhouse.tune.sketches import Sketches

# So many records that go on differently make a text a shared one; texts so much alike are one.
SHARED_BY = 5
ALIKE = 0.8
_SYSTEM = ("system", "developer")


class Own:
    """Records without the texts in `shared`, which are hashes of `plain` texts."""

    def __init__(self, shared: frozenset[int] = frozenset()) -> None:
        self._shared = shared

    def shared(self, record: Record) -> set[int]:
        """Which shared texts the record has."""
        return {one for one in map(hash_of, _heads(record)) if one in self._shared}

    def prompt(self, record: Record) -> str:
        """All that stands before the answer, but what is shared."""
        shared = self.shared(record)
        if not shared:
            return prompt_of(record)
        if "messages" not in record:
            return str(record["input"])
        return "\n\n".join(
            message["content"]
            for message in record["messages"][:-1]
            if message["role"] not in _SYSTEM or hash_of(message["content"]) not in shared
        )

    def text(self, record: Record) -> str:
        """Prompt and answer, but what is shared: what two records are compared by."""
        return f"{self.prompt(record)}\n{answer_of(record)}"

    def question(self, record: Record) -> str:
        """The prompt without any system's text: what is asked."""
        if "messages" not in record:
            return self.prompt(record)
        return "\n\n".join(turn["content"] for turn in record["messages"][:-1] if turn["role"] not in _SYSTEM)


def own_of(records: Iterable[Record], options: Duplicates, folder: Path) -> Own:
    """Finds the texts that at least SHARED_BY of `records` share, each with another input or other turns of the user.

    Texts at least ALIKE alike are one: a name or a date in it makes a system's text no other. Memory is a few numbers a
    record.
    """
    rows: dict[int, int] = {}  # of a text's hash
    seen = array("Q")

    def heads() -> Iterator[tuple[int, str]]:
        for record in records:
            for head in _heads(record):
                key = hash_of(head)
                if key not in rows:
                    rows[key] = len(rows)
                    yield rows[key], head
                seen.extend((rows[key], hash_of(_rest(record))))

    texts = Sketches(heads(), options, folder / "heads")
    groups = Groups(len(rows))
    join_alike(groups, texts, ALIKE)
    roots = np.array(groups.roots(), dtype=np.uint64)
    pairs = np.frombuffer(seen, dtype=np.uint64).reshape(-1, 2)
    distinct = np.unique(np.stack([roots[pairs[:, 0]], pairs[:, 1]], axis=1), axis=0)
    shared = {root for root, count in Counter(distinct[:, 0].tolist()).items() if count >= SHARED_BY}
    return Own(frozenset(key for key, row in rows.items() if int(roots[row]) in shared))


@lru_cache(maxsize=256)  # a shared text comes again and again
def hash_of(text: str) -> int:
    """64 bits of a hash of the text, but for case, spaces and marks."""
    digest = hashlib.blake2b(plain(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _heads(record: Record) -> Iterator[str]:
    """The texts of a record that others may share: its system's, or its instruction where an input follows."""
    if "messages" in record:
        yield from (message["content"] for message in record["messages"] if message["role"] in _SYSTEM)
    elif record["input"].strip():
        yield record["instruction"]


def _rest(record: Record) -> str:
    if "messages" not in record:
        return str(record["input"])
    return "\n\n".join(message["content"] for message in record["messages"] if message["role"] == "user")
