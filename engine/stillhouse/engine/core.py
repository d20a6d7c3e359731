"""The engine: continuous batching over token ids. `step()` is the whole of it: schedule, run, sample, emit.

Rows of the decode batch are slots 0 … n−1 of the KV cache; the one request whose prompt is being prefilled has slot n.
A request joins when its prompt is in the cache and leaves at the step that ends it: the last row moves into its place.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine import sampler
from stillhouse.engine.errors import EngineClosed, EngineError, PromptTooLong, QueueFull, StillhouseError
from stillhouse.engine.request import FinishReason, Request, Sink, Token
from stillhouse.engine.sampling import SamplingParams

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What runs the model: see runner.OrtRunner. The tests have one that counts."""

    def prefill(self, slot: int, tokens: Sequence[int], past: int) -> NDArray[np.float32]: ...
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]: ...
    def move(self, source: int, target: int, tokens: int) -> None: ...
    def release(self, slot: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of an engine, in tokens and sequences."""

    slots: int
    max_model_len: int
    kv_capacity_tokens: int
    prefill_chunk_tokens: int = 256
    max_waiting: int = 1024


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of what the engine does and has done."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    prompt_tokens_total: int
    generation_tokens_total: int
    requests_finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Runs requests to their end on a thread of its own (`start`), or a step at a time (`step`) in tests."""

    def __init__(self, runner: Runner, limits: Limits, eos_token_ids: Sequence[int]) -> None:
        self.limits = limits
        self._runner = runner
        self._eos_ids = frozenset(eos_token_ids)
        self._waiting: deque[Request] = deque()
        self._decoding: list[Request] = []  # row r decodes in slot r
        self._prefilling: Request | None = None  # in slot len(self._decoding)
        self._reserved_tokens = 0
        self._ids = itertools.count()
        self._prompt_tokens_total = 0
        self._generation_tokens_total = 0
        self._finished: Counter[str] = Counter()
        self._failure: StillhouseError | None = None
        self._wake = threading.Condition()  # guards _waiting, _failure and _closing
        self._closing = False
        self._thread: threading.Thread | None = None

    # What other threads may call

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, sink: Sink) -> Request:
        """Queues a request and returns at once; `sink` gets its tokens from the engine's thread.

        Raises PromptTooLong (prompt and context in its message), QueueFull, or EngineClosed.
        """
        if not prompt_ids:
            raise EngineError("the prompt is empty: at least one token is needed", hint="give some text")
        if len(prompt_ids) >= self.limits.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.limits.max_model_len}"
                " with at least one token of answer",
                hint="shorten the prompt, or serve with a larger --max-model-len",
            )
        request = Request(f"r{next(self._ids)}", prompt_ids, params, sink)
        with self._wake:
            if self._failure or self._closing:
                raise self._failure or EngineClosed("the engine is shut down")
            if len(self._waiting) >= self.limits.max_waiting + self._free_slots():
                raise QueueFull(
                    f"{len(self._waiting)} requests are waiting, the queue holds {self.limits.max_waiting}",
                    hint="try again later, or raise max_waiting in engine.json",
                )
            self._waiting.append(request)
            self._wake.notify()
        return request

    def stats(self) -> Stats:
        running = [*self._decoding, *([self._prefilling] if self._prefilling else [])]
        return Stats(
            running=len(running),
            waiting=len(self._waiting),
            kv_tokens_used=sum(request.kv_tokens for request in running),
            kv_tokens_capacity=self.limits.kv_capacity_tokens,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            requests_finished=dict(self._finished),
        )

    @property
    def healthy(self) -> bool:
        return self._failure is None and not self._closing

    def start(self) -> None:
        """Starts the thread that steps while there is work, and sleeps while there is none."""
        self._thread = threading.Thread(target=self._loop, name="stillhouse-engine", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after the running step; what was under way ends as cancelled."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread:
            self._thread.join(timeout_s)

    # The loop

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._has_work())
                if self._closing:
                    break
            try:
                self.step()
            except Exception as error:  # the boundary: whatever the runtime throws must end requests, not hang them
                log.exception("the engine's loop failed")
                self._fail(EngineClosed(f"the engine's loop failed: {type(error).__name__}: {error}"))
                return
        self._end_all("cancelled", None)

    def _has_work(self) -> bool:
        return bool(self._waiting or self._decoding or self._prefilling)

    def step(self) -> None:
        """One round: drop what was cancelled, prefill up to a chunk, then one token for every decoding row."""
        self._drop_cancelled()
        budget_tokens = self.limits.prefill_chunk_tokens
        while (request := self._next_to_prefill(budget_tokens)) is not None:
            budget_tokens -= self._prefill(request, budget_tokens)
        if self._decoding:
            self._decode()

    # Schedule

    def _drop_cancelled(self) -> None:
        with self._wake:
            gone = [request for request in self._waiting if request.cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            self._emit_end(request, "cancelled", None)
        if self._prefilling and self._prefilling.cancelled:
            self._end(self._prefilling, "cancelled")
        for request in [request for request in self._decoding if request.cancelled]:
            self._end(request, "cancelled")

    def _next_to_prefill(self, budget_tokens: int) -> Request | None:
        """The request whose prompt gets the rest of this step's budget: the one begun, or the next that has room."""
        if self._prefilling:
            return self._prefilling if budget_tokens == self.limits.prefill_chunk_tokens else None
        with self._wake:
            if not self._waiting or not self._free_slots():
                return None
            request = self._waiting[0]
            # A step's leftover is worth running only if it takes a prompt whole: small chunks cost as much as large.
            if budget_tokens < min(request.num_prompt_tokens, self.limits.prefill_chunk_tokens):
                return None
            if self._reserved_tokens + self._reserve(request) > self.limits.kv_capacity_tokens:
                return None
            self._waiting.popleft()
        self._reserved_tokens += self._reserve(request)
        self._prompt_tokens_total += request.num_prompt_tokens
        request.timing.scheduled_s = time.perf_counter()
        self._prefilling = request
        return request

    def _free_slots(self) -> int:
        return self.limits.slots - len(self._decoding) - (self._prefilling is not None)

    def _reserve(self, request: Request) -> int:
        """The KV tokens that `request` can come to need."""
        return min(request.num_prompt_tokens + request.params.max_tokens, self.limits.max_model_len)

    # Run

    def _prefill(self, request: Request, budget_tokens: int) -> int:
        """Prefills one chunk of the prompt; at its end the first token is sampled. Returns the tokens run."""
        past = request.kv_tokens
        count = chunk_size(request.num_prompt_tokens - past, budget_tokens)
        logits = self._runner.prefill(len(self._decoding), request.prompt_ids[past : past + count], past)
        request.kv_tokens += count
        if request.prefilled:
            self._prefilling = None
            self._decoding.append(request)
            self._emit([request], logits[-1:])
        return count

    def _decode(self) -> None:
        rows = list(self._decoding)
        logits = self._runner.decode([row.output_ids[-1] for row in rows], [row.kv_tokens for row in rows])
        for row in rows:
            row.kv_tokens += 1
        self._emit(rows, logits)

    # Sample and emit

    def _emit(self, rows: Sequence[Request], logits: NDArray[np.float32]) -> None:
        """Samples a token for each row and hands it over; a row that ends leaves its slot."""
        now = time.perf_counter()
        for request, choice in zip(rows, sampler.choose(logits, rows, self._eos_ids), strict=True):
            if choice.token_id is None:
                error = EngineError(
                    "the model's logits are not finite (NaN or inf)", hint="check the version's quality"
                )
                self._end(request, "error", error)
                continue
            request.output_ids.append(choice.token_id)
            self._generation_tokens_total += 1
            if request.timing.first_token_s is None:
                request.timing.first_token_s = now
            reason = self._finish_reason(request, choice.token_id)
            if reason:
                self._free(request, reason)
            stopped = request.sink(Token(choice.token_id, choice.logprob, choice.top_logprobs, reason))
            if stopped and not reason:
                self._free(request, "stop")

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params, count = request.params, len(request.output_ids)
        if count >= params.min_tokens:
            if token_id in self._eos_ids and not params.ignore_eos:
                return "stop"
            if token_id in params.stop_token_ids:
                return "stop"
        if count >= params.max_tokens or request.num_prompt_tokens + count >= self.limits.max_model_len:
            return "length"
        return None

    # The end of a request

    def _end(self, request: Request, reason: FinishReason, error: StillhouseError | None = None) -> None:
        self._free(request, reason)
        request.sink(Token(None, finish_reason=reason, error=error))

    def _emit_end(self, request: Request, reason: FinishReason, error: StillhouseError | None) -> None:
        """The end of a request that never had a slot."""
        request.timing.finished_s = time.perf_counter()
        self._finished[reason] += 1
        request.sink(Token(None, finish_reason=reason, error=error))

    def _free(self, request: Request, reason: FinishReason) -> None:
        """Takes `request` out of the batch; the last row moves into its place, so that rows stay slots 0 … n−1."""
        request.timing.finished_s = time.perf_counter()
        self._finished[reason] += 1
        self._reserved_tokens -= self._reserve(request)
        partial = self._prefilling
        if request is partial:
            self._prefilling = None
            self._runner.release(len(self._decoding))
            return
        row, last = self._decoding.index(request), len(self._decoding) - 1
        moved = self._decoding.pop()
        if row == last:
            self._runner.release(last)
        else:
            self._decoding[row] = moved
            self._runner.move(last, row, moved.kv_tokens)
        if partial:
            self._runner.move(last + 1, last, partial.kv_tokens)

    def _fail(self, failure: StillhouseError) -> None:
        with self._wake:
            self._failure = failure
        self._end_all("error", failure)

    def _end_all(self, reason: FinishReason, error: StillhouseError | None) -> None:
        with self._wake:
            gone = [*self._decoding, *([self._prefilling] if self._prefilling else []), *self._waiting]
            self._waiting.clear()
            self._decoding.clear()
            self._prefilling = None
        for request in gone:
            self._emit_end(request, reason, error)


def chunk_size(remaining_tokens: int, budget_tokens: int) -> int:
    """How many tokens of a prompt to run now: never so many that a single one is left over.

    One token is another kernel than several (MatMulNBits at accuracy level 4), with slightly other logits: a prompt
    whose last chunk were one token would answer otherwise than the same prompt run whole.
    """
    count = min(remaining_tokens, budget_tokens)
    return count - 1 if remaining_tokens - count == 1 else count
