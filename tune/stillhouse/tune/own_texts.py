"""What of a record is its own: a system's text, or an instruction, that many records share says nothing about any.

Behind one system prompt all chats are alike, and so are all inputs behind one instruction. Where records are compared,
such a text is left out, and counted as one more thing that two of them must have in common.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from stillhouse.tune.records import Record, answer_of, prompt_of
from stillhouse.tune.signatures import plain

# So many records that go on differently make a text a shared one.
SHARED_BY = 5
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


def own_of(records: Iterable[Record]) -> Own:
    """Finds the texts that at least SHARED_BY of `records` share, each with another input or other turns of the user.

    Memory is two hashes a record.
    """
    seen = array("Q")
    for record in records:
        for head in _heads(record):
            seen.extend((hash_of(head), hash_of(_rest(record))))
    pairs = np.unique(np.frombuffer(seen, dtype=np.uint64).reshape(-1, 2), axis=0)
    heads, counts = np.unique(pairs[:, 0], return_counts=True)
    return Own(frozenset(heads[counts >= SHARED_BY].tolist()))


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
