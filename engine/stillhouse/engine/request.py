"""A request on its way through the engine, and what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One step's result for a request. `token_id` is None when it ended without a token (cancelled, error)."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None
    finish_reason: FinishReason | None = None
    error: StillhouseError | None = None


@dataclass(slots=True)
class Timing:
    """Moments of a request on the clock of time.perf_counter, in seconds; None: not reached yet."""

    submitted_s: float = field(default_factory=time.perf_counter)
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


# Called from the engine's thread with every token; returning True ends the request (a stop string was found).
Sink = Callable[[Token], "bool | None"]


class Request:
    """A handle on a submitted request; only `cancel` may be called from any thread, the rest is to be read."""

    __slots__ = (
        "_cancelled",
        "id",
        "kv_tokens",
        "output_ids",
        "params",
        "prompt_ids",
        "sampler_state",
        "sink",
        "timing",
    )

    def __init__(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, sink: Sink) -> None:
        self.id = request_id
        self.prompt_ids = list(prompt_ids)
        self.params = params
        self.sink = sink
        self.timing = Timing()
        self.output_ids: list[int] = []
        self.kv_tokens = 0  # tokens of this request that are in the KV cache
        self.sampler_state: object | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Asks for an end; the slot is free after the running step, and a last token says "cancelled"."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def prefilled(self) -> bool:
        return self.kv_tokens >= len(self.prompt_ids)
