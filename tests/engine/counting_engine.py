"""An engine without a model: its next token is a fixed function of every token in the slot.

So an answer changes if a scheduler ever feeds a wrong token, mixes two slots up, or moves one wrongly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.core import Engine
from stillhouse.engine.request import Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits

VOCAB_SIZE = 64
EOS = 0
CONTEXT = 64
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


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


class WantingRunner(CountingRunner):
    """A model that wants to say `wanted`, token by token, `instead` where it may not, and nothing else.

    Each token has one `instead` of it.
    """

    def __init__(self, prompt_tokens: int, wanted: Sequence[int], instead: Sequence[int], vocab_size: int) -> None:
        super().__init__(1)
        self._prompt_tokens, self._vocab_size = prompt_tokens, vocab_size
        self._wanted = list(zip(wanted, instead, strict=True))

    def _logits(self, context: Sequence[int]) -> NDArray[np.float32]:
        logits = np.zeros(self._vocab_size, np.float32)
        at = len(context) - self._prompt_tokens
        if 0 <= at < len(self._wanted):
            logits[list(self._wanted[at])[::-1]] = 8.0, 9.0
        return logits


def make_engine(
    slots: int = 4, *, chunk: int = 8, capacity: int | None = None, prefix_slots: int = 0, **limits: Any
) -> Engine:
    runner = CountingRunner(slots + prefix_slots)
    sizes = Limits(
        slots,
        CONTEXT,
        capacity or (slots + prefix_slots) * CONTEXT,
        prefill_chunk_tokens=chunk,
        prefill_alone_tokens=chunk,
        prefix_slots=prefix_slots,
        **limits,
    )
    return Engine(runner, sizes, [EOS])


class Collected:
    """A sink that keeps what it got."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokens: list[Token] = []
        self._stop_after = stop_after
        self.stopped = False

    def __call__(self, token: Token) -> bool:
        assert not (self.reason or self.stopped), "a token came after the last"
        self.tokens.append(token)
        self.stopped = self._stop_after is not None and len(self.ids) >= self._stop_after
        return self.stopped

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens if token.token_id is not None]

    @property
    def reason(self) -> str | None:
        return self.tokens[-1].finish_reason if self.tokens else None


def run_until_idle(engine: Engine, most_steps: int = 10_000) -> None:
    for _ in range(most_steps):
        if not engine.stats().running and not engine.stats().waiting:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def answer_alone(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    engine, sink = make_engine(1, chunk=1000), Collected()
    engine.submit(prompt, params, sink)
    run_until_idle(engine)
    return sink.ids


def assert_nothing_is_held(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    assert engine._runner.slots == [None] * len(engine._runner.slots)  # type: ignore[attr-defined]


def forget_prefixes(engine: Engine) -> None:
    while engine._scheduler._forget_one_prefix():
        pass
