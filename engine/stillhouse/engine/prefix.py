"""Prompts that begin alike are prefilled once: which slot holds the longest beginning of a new prompt.

Only what a prefill wrote is reused, never what a decode step wrote: one token is another kernel than several, and an
answer would depend on what ran before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Below this a copy saves nothing that one could measure.
LEAST_TOKENS = 16
# A prompt is worth keeping when less than this share of it is kept already.
NEW_SHARE = 0.75


@dataclass(slots=True)
class Kept:
    """The beginning of a prompt, in a slot of its own."""

    slot: int
    prompt_ids: Sequence[int]


class PrefixCache:
    """The prompts kept in slots beyond those of the batch; the least recently used goes first."""

    def __init__(self, slots: Iterable[int]) -> None:
        self._free = list(slots)
        self._kept: list[Kept] = []  # the least recently used first

    @property
    def tokens(self) -> int:
        return sum(len(kept.prompt_ids) for kept in self._kept)

    def find(self, prompt_ids: Sequence[int]) -> tuple[int, int]:
        """(slot, tokens) of the longest beginning of `prompt_ids` that is kept; (-1, 0) where there is none."""
        best, shared = None, 0
        for kept in self._kept:
            length = common_prefix(kept.prompt_ids, prompt_ids)
            if length > shared:
                best, shared = kept, length
        if best is None:
            return -1, 0
        self._kept.remove(best)
        self._kept.append(best)
        return best.slot, shared

    def covers(self, prompt_ids: Sequence[int]) -> bool:
        """Whether so much of `prompt_ids` is kept that keeping it too would gain little."""
        longest = max((common_prefix(kept.prompt_ids, prompt_ids) for kept in self._kept), default=0)
        return longest >= NEW_SHARE * len(prompt_ids)

    def add(self, prompt_ids: Sequence[int]) -> int:
        """Keeps `prompt_ids` and returns the slot for it. There must be a free one: see `evict`."""
        slot = self._free.pop()
        self._kept.append(Kept(slot, tuple(prompt_ids)))
        return slot

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free)

    def evict(self) -> int | None:
        """Forgets the least recently used prompt and returns its slot; None where nothing is kept."""
        if not self._kept:
            return None
        slot = self._kept.pop(0).slot
        self._free.append(slot)
        return slot


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with in common; by halving, since comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    if tuple(a[:high]) == tuple(b[:high]):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if tuple(a[low:middle]) == tuple(b[low:middle]):
            low = middle
        else:
            high = middle
    return low
