"""Between the engine's types and what the client sends and gets: parameters, chunks, errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from stillhouse.client import (
    ClientError,
    ConnectionFailed,
    InvalidCall,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Token,
)
from stillhouse.engine.answer import Chunk
from stillhouse.engine.errors import DeadlineExceeded, InvalidRequest, StillhouseError
from stillhouse.engine.request import PromptLogprob
from stillhouse.engine.sampling import SamplingParams
from stillhouse.gateway.errors import Unavailable
from stillhouse.serve.errors import KINDS

_DEFAULTS = SamplingParams()
_BY_KIND = {said: kind for kind, said in KINDS.items()}


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """The parameters as JSON has them, without those that are the engine's defaults; `parse_params` reads them."""
    given: dict[str, Any] = {}
    for field in fields(params):
        value = getattr(params, field.name)
        if value == getattr(_DEFAULTS, field.name):
            continue
        if field.name == "structured_outputs":
            value = {value.kind: value.value}
        elif field.name == "logit_bias":
            value = {str(token): bias for token, bias in value.items()}
        given[field.name] = list(value) if isinstance(value, tuple) else value
    return given


def chunks_of(token: Token) -> Iterator[Chunk]:
    """The chunks in one response: one a token, the text with the last of them."""
    details = token.details or {}
    ids: list[int] = details["token_ids"]
    logprobs: list[Any] = details.get("logprobs") or [[None, None, None]] * len(ids)
    before = details["num_output_tokens"] - len(ids)
    last = max(0, len(ids) - 1)
    for place in range(last + 1):
        logprob, rank, top = logprobs[place] if ids else (None, None, None)
        yield Chunk(
            text=token.text if place == last else "",
            token_ids=tuple(ids[place : place + 1]),
            num_prompt_tokens=details["num_input_tokens"],
            num_output_tokens=before + min(place + 1, len(ids)),
            finish_reason=details["finish_reason"] if place == last else None,
            logprob=logprob,
            rank=rank,
            top_logprobs=None if top is None else dict(top),
            prompt_logprobs=_prompt_logprobs(details) if place == 0 else None,
            num_thinking_tokens=details["num_thinking_tokens"],
        )


def _prompt_logprobs(details: Any) -> list[PromptLogprob] | None:
    found = details.get("prompt_logprobs")
    if found is None:
        return None
    return [PromptLogprob(token, logprob, dict(top), rank) for token, logprob, top, rank in found]


def engine_error(error: ClientError, model: str) -> StillhouseError:
    """The error that the engine itself would have raised for what the client met."""
    # The client says which model it was, and how far an answer had come; the hint of the engine's error is in the text.
    if error.kind is not None:
        return _BY_KIND[error.kind](str(error).partition(f"{model}: {error.kind}: ")[2])
    message = str(error).removeprefix(f"{model}: ")
    if isinstance(error, RequestRejected) and not isinstance(error, ModelNotFound):
        # By Triton itself: whoever asked the gateway had no hand in what it refused.
        return StillhouseError(message)
    if isinstance(error, TimedOut):
        return DeadlineExceeded(message)
    if isinstance(error, InvalidCall):
        return InvalidRequest(message)
    # Triton's address is nobody's business who asked the gateway.
    if isinstance(error, ConnectionFailed):
        return Unavailable("Triton cannot be reached")
    if isinstance(error, StreamBroken):
        return Unavailable(f"{model} went down while it answered")
    return Unavailable(message)
