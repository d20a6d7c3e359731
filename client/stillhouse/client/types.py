"""What goes in and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# One turn of a conversation in OpenAI's form: {"role": "user", "content": "…"}.
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Token:
    """One response of a stream. Counts are the server's; None where it does not count.

    `text` is the new text alone; it may be empty while the server holds back half a character.
    """

    text: str
    index: int  # of the response, from 0
    time_s: float  # since the request was sent
    finish_reason: str | None  # set on the last one: "stop", "length", …
    num_input_tokens: int | None
    num_output_tokens: int | None  # generated so far
    cumulative_logprob: float | None  # of everything generated so far
    details: Mapping[str, Any] | None = None  # what the server tells of the tokens, where `details` was asked for


@dataclass(frozen=True)
class Completion:
    """A whole answer, without the prompt. Counts are the server's; None where it does not count."""

    text: str
    finish_reason: str | None
    num_input_tokens: int | None
    num_output_tokens: int | None
    cumulative_logprob: float | None
    ttft_s: float | None  # time to the first token; None where the answer was not streamed
    e2e_s: float  # from sending the request to the end of the answer


@dataclass(frozen=True)
class ModelEntry:
    """A version of a model, as the server's repository index has it."""

    name: str
    version: str  # "" where no version is loaded
    state: str  # "READY", "UNAVAILABLE", …
    reason: str

    @property
    def ready(self) -> bool:
        return self.state == "READY"


@dataclass(frozen=True)
class Request:
    """What a transport sends: the tensors by name, of type STRING (str), BOOL (bool) or INT32 (list)."""

    model: str
    version: str  # "" for whichever is live
    inputs: Mapping[str, str | bool | list[int]]
    stream: bool


@dataclass(frozen=True)
class Reply:
    """One response as it came: `num_output_tokens` counts those of this response alone."""

    text: str
    finish_reason: str | None
    num_input_tokens: int | None
    num_output_tokens: int | None
    cumulative_logprob: float | None
    received_s: float  # of time.perf_counter
    ends: bool = False  # the server's own end marker; carries nothing else
    details: Mapping[str, Any] | None = None
    has_finish_reason: bool = True  # False: there is no such output in the response, not even one that says none
