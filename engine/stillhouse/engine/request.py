"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.thinking import Thinking

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """How likely the model found a token of the prompt (`rank` 1: the likeliest), and what it found likelier."""

    token_id: int
    logprob: float
    top_logprobs: dict[int, float]
    rank: int


@dataclass(frozen=True, slots=True)
class Token:
    """One step's result for a request. `token_id` is None when it ended without a token (cancelled, error)."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    rank: int | None = None  # of the token by the model's own logits, 1 the most likely; with its logprob
    finish_reason: FinishReason | None = None
    error: StillhouseError | None = None
    prompt_logprobs: list[PromptLogprob] | None = None  # with the first token, where they were asked for


@dataclass(slots=True)
class Timing:
    """Moments of a request on the clock of time.perf_counter, in seconds; None: not reached yet."""

    submitted_s: float = field(default_factory=time.perf_counter)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


class Constraint(Protocol):
    """What an answer must look like, token by token: see grammar.py."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: (vocab_size,). Raises EngineError when none may."""
        ...

    def push(self, token_id: int) -> None: ...

    @property
    def finished(self) -> bool:
        """Whether nothing can follow any more."""
        ...


# Called from the engine's thread with every token; returning True ends the request (a stop string was found).
Sink = Callable[[Token], "bool | None"]


class Request:
    """A handle on a submitted request; only `cancel` may be called from any thread, the rest is to be read."""

    __slots__ = (
        "_cancelled",
        "constraint",
        "generator",
        "id",
        "kv_tokens",
        "output_ids",
        "params",
        "prefix_tokens",
        "prompt_ids",
        "prompt_logprobs",
        "sink",
        "thinking",
        "timeout_s",
        "timing",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        timeout_s: float | None = None,
        came_s: float | None = None,
        thinking: Thinking | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.id = request_id
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.sink = sink
        self.timeout_s = timeout_s
        self.thinking = thinking
        self.constraint = constraint
        self.timing = Timing() if came_s is None else Timing(came_s)
        self.output_ids: list[int] = []
        self.kv_tokens = 0  # tokens of this request that are in the KV cache
        self.prefix_tokens = 0  # of which copied from another prompt
        self.prompt_logprobs: list[PromptLogprob] = []  # of the prompt's second token, third, …
        self.generator: np.random.Generator | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Asks for an end; the slot is free after the running step, and a last token says "cancelled"."""
        self._cancelled = True

    def take(self, token_id: int, now_s: float) -> None:
        """Adds a generated token, and lets whatever follows the answer follow it."""
        self.output_ids.append(token_id)
        if self.timing.first_token_s is None:
            self.timing.first_token_s = now_s
        thought = self.thinking is not None and self.thinking.inside
        if self.thinking:
            self.thinking.push(token_id)
        if self.constraint and not thought:
            self.constraint.push(token_id)

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def rank(self) -> tuple[int, float]:
        """The place among those who wait: the lower the sooner; among equals of priority the older first."""
        return self.params.priority, self.timing.submitted_s

    @property
    def over(self) -> bool:
        """Whether it is cancelled or out of time."""
        if self._cancelled:
            return True
        return self.timeout_s is not None and time.perf_counter() - self.timing.submitted_s > self.timeout_s

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def prefilled(self) -> bool:
        return self.kv_tokens >= len(self.prompt_ids)
