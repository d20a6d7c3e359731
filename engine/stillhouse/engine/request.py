"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.sampling import SamplingParams
from stillhouse.engine.thinking import Thinking

log = logging.getLogger(__name__)

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
    is_end: bool = False  # it only says that the answer is over: no part of its text


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
        """Which tokens may come next: (vocab_size,), the caller's to change. Raises EngineError when none may."""
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
        "form_binds",
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
        # Whether `constraint` holds for the next token: what is thought before the answer is free of it.
        self.form_binds = constraint is not None and not (thinking and thinking.inside)
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
        if self.timing.first_token_s is None:
            self.timing.first_token_s = now_s
        if self.constraint and self.form_binds:
            self._follow_form(self.constraint, token_id)
        elif self.thinking:
            self.thinking.push(token_id)
            self.form_binds = self.constraint is not None and not self.thinking.inside
        self.output_ids.append(token_id)

    def _follow_form(self, constraint: Constraint, token_id: int) -> None:
        # A form that takes the tag itself begins with it; any other begins behind the thoughts that the tag opens.
        if self.thinking and token_id == self._opening_id and not constraint.allowed()[token_id]:
            self.thinking.open()
            self.form_binds = False
        else:
            constraint.push(token_id)

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next by the answer's form: (vocab_size,); None where any may.

        A model that opens its thoughts itself may do so first: the form is the answer's, as in vLLM where a parser of
        reasoning is named.
        """
        if not self.constraint:
            return None
        if not self.form_binds:
            return self._allowed_in_thoughts(self.constraint)
        allowed = self.constraint.allowed()
        if self._opening_id is not None:
            allowed[self._opening_id] = True
        return allowed

    def _allowed_in_thoughts(self, constraint: Constraint) -> NDArray[np.bool_] | None:
        """Any token but one that would end the thoughts and begin the answer at once: the form would not see it."""
        if not self.thinking or not (straddling := self.thinking.straddling_ids):
            return None
        allowed = np.ones_like(constraint.allowed())
        allowed[list(straddling)] = False
        return allowed

    @property
    def _opening_id(self) -> int | None:
        """The token that opens thoughts, as long as nothing has been said."""
        return self.thinking.opening_id if self.thinking and not self.output_ids else None

    def reason_to_end(self, token_id: int, eos_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Why `token_id`, which came last, is the last of the answer; None where more follow."""
        params, count = self.params, len(self.output_ids)
        if count >= params.min_tokens:
            if token_id in eos_ids and not params.ignore_eos:
                return "stop"
            if token_id in params.stop_token_ids or (self.constraint and self.constraint.finished):
                return "stop"
        if count >= params.max_tokens or self.num_prompt_tokens + count >= max_model_len:
            return "length"
        return None

    def tell_the_end(self, reason: FinishReason, error: StillhouseError | None) -> None:
        """The last that the answer's reader hears; one that fails at it harms nobody else."""
        try:
            self.sink(Token(None, finish_reason=reason, error=error))
        except Exception:  # the boundary to whoever reads the answer
            log.exception("%s could not be told of its end", self.id)

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
