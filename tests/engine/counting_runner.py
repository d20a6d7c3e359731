"""A runner without a model: its next token is a fixed function of every token in the slot.

So an answer changes if a scheduler ever feeds a wrong token, mixes two slots up, or moves one wrongly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

VOCAB_SIZE = 64
EOS = 0


class CountingRunner:
    def __init__(self, slots: int) -> None:
        self.slots: list[list[int] | None] = [None] * slots
        self.prefill_sizes: list[int] = []
        self.decode_rows: list[int] = []
        self.swaps = 0
        self.poisoned: set[tuple[int, ...]] = set()

    def prefill(self, slot: int, tokens: Sequence[int], past: int, *, last_only: bool = False) -> NDArray[np.float32]:
        held = self.slots[slot] or []
        assert len(held) == past, f"slot {slot} holds {len(held)} tokens, the scheduler believes {past}"
        self.prefill_sizes.append(len(tokens))
        self.slots[slot] = [*held, *tokens]
        first = len(tokens) - 1 if last_only else 0
        rows = [self._logits([*held, *tokens[: i + 1]]) for i in range(first, len(tokens))]
        return np.stack(rows)

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]:
        self.decode_rows.append(len(tokens))
        rows = []
        for slot, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            held = self.slots[slot]
            assert held is not None, f"slot {slot} is free"
            assert len(held) == length, f"slot {slot} holds {len(held)} tokens, the scheduler believes {length}"
            held.append(token)
            rows.append(self._logits(held))
        return np.stack(rows)

    def copy(self, source: int, target: int, tokens: int) -> None:
        held = self.slots[source]
        assert held is not None, f"slot {source} is free"
        assert len(held) >= tokens
        self.slots[target] = held[:tokens]

    def swap_out(self, slot: int, tokens: int) -> list[int]:
        held = self.slots[slot]
        assert held is not None
        assert len(held) == tokens
        self.swaps += 1
        return list(held)

    def swap_in(self, slot: int, swapped: list[int]) -> None:
        assert self.slots[slot] is None, f"slot {slot} is taken"
        self.slots[slot] = list(swapped)

    def release(self, slot: int) -> None:
        self.slots[slot] = None

    def _logits(self, context: Sequence[int]) -> NDArray[np.float32]:
        if tuple(context) in self.poisoned:
            return np.full(VOCAB_SIZE, np.nan, np.float32)
        seed = zlib.crc32(np.asarray(context, np.int64).tobytes())
        logits = np.random.default_rng(seed).normal(size=VOCAB_SIZE).astype(np.float32)
        logits[EOS] -= 1.0
        return logits
