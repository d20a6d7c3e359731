"""Who runs in which slot: admission, chunks, preemption and prefix reuse within a budget of KV tokens.

Slots 0 … n−1 hold the rows of the decode batch, slot n the one prompt that is being prefilled, and the slots beyond
`limits.slots` the prompts that are kept for reuse. When a row leaves, the last one moves into its place.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.prefix import LEAST_TOKENS, PrefixCache, common_prefix
from stillhouse.engine.request import Request

# A request is admitted only if every row could go on for so many tokens: less, and it would be preempted at once.
HEADROOM_TOKENS = 8
LEAST_WAITING = 4  # where no number is said


class Runner(Protocol):
    """What runs the model: see runner.OrtRunner. The tests have one that counts."""

    def prefill(
        self, slot: int, tokens: Sequence[int], past: int, *, last_only: bool = False
    ) -> NDArray[np.float32]: ...
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]: ...
    def copy(self, source: int, target: int, tokens: int) -> None: ...
    def release(self, slot: int) -> None: ...
    def swap_out(self, slot: int, tokens: int) -> Any: ...
    def swap_in(self, slot: int, swapped: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of an engine, in tokens and sequences.

    While others decode, a step prefills at most `prefill_chunk_tokens`; alone, `prefill_alone_tokens`.
    """

    slots: int
    max_model_len: int
    kv_capacity_tokens: int
    prefill_chunk_tokens: int = 128
    prefill_alone_tokens: int = 512
    max_waiting: int = 1024
    prefix_slots: int = 0

    def waiting_behind(self, together: int) -> int:
        """How many may wait behind `together` that run: as much fewer as those are fewer than the slots."""
        return min(self.max_waiting, max(LEAST_WAITING, self.max_waiting * together // self.slots))

    def most_alike(self, num_prompt_tokens: int) -> int:
        """How many requests with prompts of this length an engine takes in that has nothing else to do."""
        fit = (self.kv_capacity_tokens - 1 + HEADROOM_TOKENS) // (num_prompt_tokens + HEADROOM_TOKENS)
        together = min(self.slots, max(1, fit))
        # Of free slots, the cache refuses none before somebody waits for it.
        return together + max(self.waiting_behind(together), int(together < self.slots))


class Scheduler:
    """The state of the batch. One thread only: the engine's."""

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self._runner = runner
        self._limits = limits
        self.waiting: deque[Request] = deque()  # by rank
        self.decoding: list[Request] = []  # row r decodes in slot r
        self.prefilling: Request | None = None  # in slot len(self.decoding)
        self._preempted: deque[tuple[Request, Any]] = deque()  # with what was swapped out, the oldest first
        self._prefixes = PrefixCache(range(limits.slots, limits.slots + limits.prefix_slots))
        self.prompt_tokens_total = 0
        self.preemptions_total = 0
        self.prefix_tokens_total = 0  # prompt tokens that were not prefilled again

    def running(self) -> Iterator[Request]:
        """Every request that was admitted and has not ended, preempted ones too."""
        yield from self.decoding
        if self.prefilling:
            yield self.prefilling
        for request, _ in self._preempted:
            yield request

    @property
    def kv_tokens(self) -> int:
        """Tokens in the cache; a prompt that is being prefilled counts whole. Any thread may ask."""
        prefilling = self.prefilling
        whole = prefilling.num_prompt_tokens if prefilling else 0
        return sum(request.kv_tokens for request in self.decoding) + whole + self._prefixes.tokens

    @property
    def num_running(self) -> int:
        """How many requests `running` names. Any thread may ask."""
        return len(self.decoding) + (self.prefilling is not None) + len(self._preempted)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.decoding or self.prefilling or self._preempted)

    @property
    def free_slots(self) -> int:
        return self._limits.slots - len(self.decoding) - (self.prefilling is not None)

    def most_waiting(self) -> int:
        """How many may wait now: those who come in at once, and `max_waiting` behind them.

        Where the KV cache holds fewer requests than there are slots, as much fewer may wait: the last of them waits
        for as long as with all slots. One that was preempted waits, too.
        """
        at_once = self._coming_in()
        together = self._limits.slots - self.free_slots + at_once
        return at_once + self._limits.waiting_behind(together) - len(self._preempted)

    def _coming_in(self) -> int:
        """How many find a slot and room in the cache as things are: every free slot, if it holds all that wait."""
        if self._preempted:
            return 0
        rows = self._limits.slots - self.free_slots
        tokens = self.kv_tokens - self._prefixes.tokens + 1  # kept prompts give way
        for count, request in enumerate(islice(self.waiting, self.free_slots)):
            tokens += request.num_prompt_tokens
            if tokens + HEADROOM_TOKENS * (rows + count) > self._limits.kv_capacity_tokens:
                return count
        return self.free_slots

    def wait(self, request: Request) -> None:
        """Puts `request` among those who wait: behind all that are of its priority or a lower one."""
        insort(self.waiting, request, key=lambda other: other.rank)

    # Before a step

    def make_room(self) -> None:
        """Sees to it that every row can write one token more: forgets kept prompts, then preempts the last by rank."""
        while self.kv_tokens + len(self.decoding) > self._limits.kv_capacity_tokens:
            if self._forget_one_prefix():
                continue
            if self.prefilling:
                # Nothing is lost: a prompt prefilled again gives the same KV, to the bit.
                request, self.prefilling = self.prefilling, None
                self._runner.release(len(self.decoding))
                request.kv_tokens = request.prefix_tokens = 0
                request.prompt_logprobs.clear()
                self.wait(request)
            else:
                self._preempt(max(self.decoding, key=lambda request: request.rank))
            self.preemptions_total += 1

    def resume(self) -> None:
        """Brings preempted requests back, the oldest first, as far as there is room."""
        while self._preempted and self.free_slots and not self.prefilling:
            request, swapped = self._preempted[0]
            if not self._make_fit(request.kv_tokens):
                return
            self._preempted.popleft()
            self._runner.swap_in(len(self.decoding), swapped)
            self.decoding.append(request)

    def next_to_prefill(self, spent_tokens: int) -> Request | None:
        """The request whose prompt runs next in this step, of which `spent_tokens` are prefilled already."""
        if self.prefilling:
            return None if spent_tokens else self.prefilling
        if not self.waiting or not self.free_slots or self._preempted:
            return None
        request = self.waiting[0]
        # What is left of a step is worth running only if it takes a prompt whole: small chunks cost like large ones.
        if spent_tokens and spent_tokens + request.num_prompt_tokens > self.chunk_tokens:
            return None
        if not self._make_fit(request.num_prompt_tokens):
            return None
        self.waiting.popleft()
        if request.timing.scheduled_s is None:
            request.timing.scheduled_s = time.perf_counter()
            self.prompt_tokens_total += request.num_prompt_tokens
        self._reuse_prefix(request)
        self.prefilling = request
        return request

    @property
    def chunk_tokens(self) -> int:
        """The most prompt tokens of a step: few while others wait for their next token."""
        return self._limits.prefill_chunk_tokens if self.decoding else self._limits.prefill_alone_tokens

    # After a step

    def joined(self, request: Request) -> None:
        """The prompt of `request` is in the cache: from now on it is a row."""
        self.prefilling = None
        self.decoding.append(request)

    def leave(self, request: Request, *, sound: bool = True) -> None:
        """Takes `request` out, wherever it is, and gives back what it holds.

        The prompt of one that is not `sound` (it ended in an error) is not kept for others.
        """
        if request is self.prefilling:
            self.prefilling = None
            self._runner.release(len(self.decoding))
        elif request in self.decoding:
            if sound:
                self._keep_prefix(request)
            self._remove_row(request)
        else:
            self._preempted = deque(item for item in self._preempted if item[0] is not request)

    # The rest

    def _fits(self, tokens: int) -> bool:
        """Whether `tokens` more can come in, and every row go on for a while; alone, nothing is held back."""
        headroom = HEADROOM_TOKENS * len(self.decoding) + 1
        return self.kv_tokens + tokens + headroom <= self._limits.kv_capacity_tokens

    def _make_fit(self, tokens: int) -> bool:
        """As `_fits`, at the cost of the prompts that are kept for reuse; none goes in vain."""
        if not self._fits(tokens - self._prefixes.tokens):
            return False
        while not self._fits(tokens):
            if not self._forget_one_prefix():
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Swaps the KV of a row out. It must not be recomputed: that would be another kernel, and another answer."""
        swapped = self._runner.swap_out(self.decoding.index(request), request.kv_tokens)
        self._remove_row(request)
        self._preempted.appendleft((request, swapped))

    def _remove_row(self, request: Request) -> None:
        row, last = self.decoding.index(request), len(self.decoding) - 1
        moved = self.decoding.pop()
        if row != last:
            self.decoding[row] = moved
            self._runner.copy(last, row, moved.kv_tokens)
        if self.prefilling:
            self._runner.copy(last + 1, last, self.prefilling.kv_tokens)
        self._runner.release(last + 1 if self.prefilling else last)

    def _reuse_prefix(self, request: Request) -> None:
        """Copies the longest beginning of the prompt that another slot holds.

        Two tokens at least are left to prefill: one alone would be another kernel.
        """
        if not self._limits.prefix_slots or request.params.prompt_logprobs is not None:
            return
        slot, shared = self._prefixes.find(request.prompt_ids)
        for row, other in enumerate(self.decoding):
            length = common_prefix(other.prompt_ids, request.prompt_ids)
            if length > shared:
                slot, shared = row, length
        shared = min(shared, request.num_prompt_tokens - 2)
        if shared >= LEAST_TOKENS:
            self._runner.copy(slot, len(self.decoding), shared)
            request.kv_tokens = request.prefix_tokens = shared
            self.prefix_tokens_total += shared

    def _keep_prefix(self, request: Request) -> None:
        """Keeps the prompt of a row that ends, if it is new and there is room for it."""
        tokens = request.num_prompt_tokens
        if not self._limits.prefix_slots or tokens < 2 * LEAST_TOKENS or self._prefixes.covers(request.prompt_ids):
            return
        if not self._prefixes.has_free_slot:
            self._forget_one_prefix()
        if self._fits(tokens):
            self._runner.copy(self.decoding.index(request), self._prefixes.add(request.prompt_ids), tokens)

    def _forget_one_prefix(self) -> bool:
        slot = self._prefixes.evict()
        if slot is None:
            return False
        self._runner.release(slot)
        return True


def chunk_size(remaining_tokens: int, budget_tokens: int) -> int:
    """How many tokens of a prompt to run now: never so many that a single one is left over.

    One token is another kernel than several (MatMulNBits at accuracy level 4), with slightly other logits: a prompt
    whose last chunk were one token would answer otherwise than the same prompt run whole.
    """
    count = min(remaining_tokens, budget_tokens)
    return count - 1 if remaining_tokens - count == 1 else count
