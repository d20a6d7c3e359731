"""The engine: continuous batching over token ids. `step()` is the whole of it: schedule, run, sample, emit."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine import sampler
from stillhouse.engine.errors import (
    DeadlineExceeded,
    EngineClosed,
    EngineError,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StillhouseError,
)
from stillhouse.engine.request import Constraint, FinishReason, Request, Sink, Token
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.scheduler import Limits, Runner, Scheduler, chunk_size
from stillhouse.engine.thinking import Thinking

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of what the engine does and has done."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    prompt_tokens_total: int
    generation_tokens_total: int
    preemptions_total: int = 0
    prefix_tokens_total: int = 0
    requests_finished: dict[str, int] = field(default_factory=dict)


class Engine:
    """Runs requests to their end on a thread of its own (`start`), or a step at a time (`step`) in tests."""

    def __init__(self, runner: Runner, limits: Limits, eos_token_ids: Sequence[int]) -> None:
        self.limits = limits
        self._runner = runner
        self._scheduler = Scheduler(runner, limits)
        self._eos_ids = frozenset(eos_token_ids)
        self._ids = itertools.count()
        self._generation_tokens_total = 0
        self._finished: Counter[str] = Counter()
        self._failure: StillhouseError | None = None
        self._wake = threading.Condition()  # guards the queue of waiting requests, _failure and _closing
        self._closing = False
        self._thread: threading.Thread | None = None

    # What other threads may call

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        timeout_s: float | None = None,
        came_s: float | None = None,
        thinking: Thinking | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """Queues a request and returns at once; `sink` gets its tokens from the engine's thread.

        `timeout_s` ends it with DeadlineExceeded, waiting or running; it counts from `came_s` on the clock of
        time.perf_counter (None: now), and so does the request's place in the queue. Raises PromptTooLong (with the
        prompt's length and the context's), QueueFull, or EngineClosed.
        """
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty: at least one token is needed", hint="give some text")
        if len(prompt_ids) >= self.limits.max_model_len:
            raise PromptTooLong(
                f"the prompt has {len(prompt_ids)} tokens, the context holds {self.limits.max_model_len}"
                " with at least one token of answer",
                hint="shorten the prompt, or serve with a larger --max-model-len",
            )
        number = f"r{next(self._ids)}"
        request = Request(
            number,
            prompt_ids,
            params,
            sink,
            timeout_s=timeout_s,
            came_s=came_s,
            thinking=thinking,
            constraint=constraint,
        )
        with self._wake:
            self.check_room()
            self._scheduler.wait(request)
            self._wake.notify()
        return request

    def check_room(self, coming: int = 0) -> None:
        """Raises QueueFull or EngineClosed where `submit` would raise it behind `coming` others."""
        if self._failure or self._closing:
            raise self._failure or EngineClosed("the engine is shut down")
        if self._thread and not self._thread.is_alive():
            raise EngineClosed("the engine's thread is not in this process", hint="load the model after a fork")
        with self._wake:
            waiting, most = len(self._scheduler.waiting) + coming, self._scheduler.most_waiting()
        if waiting >= most:
            raise QueueFull(
                f"{waiting} requests are waiting, the queue holds {max(0, most)} now",
                hint="try again later, or serve with a larger --max-waiting",
            )

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            kv_tokens_used=scheduler.kv_tokens,
            kv_tokens_capacity=self.limits.kv_capacity_tokens,
            prompt_tokens_total=scheduler.prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            preemptions_total=scheduler.preemptions_total,
            prefix_tokens_total=scheduler.prefix_tokens_total,
            requests_finished=dict(self._finished),
        )

    @property
    def healthy(self) -> bool:
        return self._failure is None and not self._closing

    @property
    def failed(self) -> bool:
        """Whether the loop has ended by a fault: it will never answer again."""
        return self._failure is not None

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
                self._wake.wait_for(lambda: self._closing or self._scheduler.has_work)
                if self._closing:
                    break
            try:
                self.step()
            except BaseException as error:  # whatever is thrown (a panic in Rust is no Exception) hangs no request
                log.exception("the engine's loop failed")
                failure = EngineClosed(f"the engine's loop failed: {type(error).__name__}: {error}")
                with self._wake:
                    self._failure = failure
                self._end_all("error", failure)
                return
        self._end_all("cancelled", None)

    def step(self) -> None:
        """One round: schedule, prefill up to a chunk, one token for every row of the batch; sample and emit."""
        scheduler = self._scheduler
        self._end_what_is_over()
        with self._wake:  # it may put a prompt back among those who wait
            scheduler.make_room()
        scheduler.resume()
        spent_tokens = 0
        while (request := self._next_to_prefill(spent_tokens)) is not None:
            spent_tokens += self._prefill(request, scheduler.chunk_tokens - spent_tokens)
        if scheduler.decoding:
            self._decode()

    def _end_what_is_over(self) -> None:
        """Ends what was cancelled or is out of time, waiting or running."""
        with self._wake:
            gone = [request for request in self._scheduler.waiting if request.over]
            for request in gone:
                self._scheduler.waiting.remove(request)
        for request in [*gone, *(request for request in self._scheduler.running() if request.over)]:
            if request.cancelled:
                self._end(request, "cancelled")
            else:
                message = f"no answer within {request.timeout_s:g} s ({len(request.output_ids)} tokens were generated)"
                self._end(request, "error", DeadlineExceeded(message, hint="allow more time, or ask for fewer tokens"))

    def _next_to_prefill(self, spent_tokens: int) -> Request | None:
        with self._wake:
            return self._scheduler.next_to_prefill(spent_tokens)

    # Run

    def _prefill(self, request: Request, budget_tokens: int) -> int:
        """Prefills one chunk of the prompt; at its end the first token is sampled. Returns the tokens run."""
        past, slot = request.kv_tokens, len(self._scheduler.decoding)
        count = chunk_size(request.num_prompt_tokens - past, budget_tokens)
        chunk = request.prompt_ids[past : past + count]
        wanted = request.params.prompt_logprobs
        logits = self._runner.prefill(slot, chunk, past, last_only=wanted is None)
        if wanted is not None:
            following = request.prompt_ids[past + 1 : past + count + 1]
            request.prompt_logprobs += sampler.logprobs_of(logits[: len(following)], following, wanted)
        request.kv_tokens += count
        if request.prefilled:
            self._scheduler.joined(request)
            self._emit([request], logits[-1:])
        return count

    def _decode(self) -> None:
        rows = list(self._scheduler.decoding)
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
                self._end(request, "error", choice.error)
                continue
            try:
                request.take(choice.token_id, now)
            except Exception as error:  # a constraint's fault is its request's alone
                self._end(request, "error", EngineError(f"the answer's form cannot be followed: {error}"))
                continue
            self._generation_tokens_total += 1
            reason = request.reason_to_end(choice.token_id, self._eos_ids, self.limits.max_model_len)
            if reason:
                self._leave(request, reason)
            asked = len(request.output_ids) == 1 and request.params.prompt_logprobs is not None
            token = Token(
                choice.token_id,
                choice.logprob,
                choice.top_logprobs,
                choice.rank,
                reason,
                prompt_logprobs=request.prompt_logprobs if asked else None,
                is_end=reason == "stop" and choice.token_id in {*self._eos_ids, *request.params.stop_token_ids},
            )
            try:
                stopped = request.sink(token)
            except Exception as error:
                self._fail_reader(request, error, gone=reason is not None)
                continue
            if stopped and not reason:
                self._leave(request, "stop")

    # The end of a request

    def _end(self, request: Request, reason: FinishReason, error: StillhouseError | None = None) -> None:
        """Ends a request without a token."""
        self._leave(request, reason)
        request.tell_the_end(reason, error)

    def _fail_reader(self, request: Request, error: Exception, *, gone: bool) -> None:
        """What reads an answer has raised `error`: that answer ends, nobody else's."""
        log.error("%s: its reader failed", request.id, exc_info=error)
        if not gone:
            self._leave(request, "error")
        request.tell_the_end("error", EngineError(f"the answer cannot be handed over: {error}"))

    def _leave(self, request: Request, reason: FinishReason) -> None:
        request.timing.finished_s = time.perf_counter()
        self._finished[reason] += 1
        self._scheduler.leave(request, sound=reason != "error")

    def _end_all(self, reason: FinishReason, error: StillhouseError | None) -> None:
        with self._wake:
            gone = [*self._scheduler.running(), *self._scheduler.waiting]
            # A new scheduler holds nothing; the slots' memory goes with the runner.
            self._scheduler = Scheduler(self._runner, self.limits)
        for request in gone:
            self._end(request, reason, error)
