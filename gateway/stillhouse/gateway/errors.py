"""Every failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}} with the status that fits."""

from __future__ import annotations

import json
import re

from stillhouse.engine.errors import (
    DeadlineExceeded,
    EngineClosed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StillhouseError,
)
from stillhouse.engine.sampling import SamplingParams

RETRY_AFTER_S = 1
_NAME = re.compile(r"\W")  # ends a parameter's name in a message of the engine's


class Unavailable(StillhouseError):
    """Nobody can answer now: loading, draining, or the model's process is gone."""


class ModelUnknown(StillhouseError):
    """No live model of this name."""


class ApiError(Exception):
    """What a client gets instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON of the error, ASCII alone: what came may hold anything."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request itself is wrong."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str) -> ApiError:
    """A 503 that asks to come again."""
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, message, kind="server_error", code="service_unavailable", headers=headers)


def too_long(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> ApiError:
    """A 400 in OpenAI's words, which clients look for to shorten a conversation."""
    return invalid(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested"
        f" {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} in the prompt, {max_tokens} for the"
        " completion). Please reduce the length of either.",
        code="context_length_exceeded",
    )


def api_error(error: Exception) -> ApiError:
    """The client's error for one of ours; of a fault that is nobody's, it tells no details."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, StillhouseError):
        return ApiError(500, "internal error; the server's log says more", kind="server_error", code="internal_error")
    message = f"{error} ({error.hint})" if error.hint else str(error)
    if isinstance(error, ModelUnknown):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, PromptTooLong):
        return invalid(message, code="context_length_exceeded")
    if isinstance(error, InvalidRequest):
        return invalid(message, param=_named_in(message))
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, (EngineClosed, Unavailable)):
        return unavailable(message)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, kind="server_error", code="deadline_exceeded")
    return ApiError(500, message, kind="server_error", code="engine_error")


def _named_in(message: str) -> str | None:
    """The parameter that one of the engine's messages begins with."""
    first = _NAME.split(message, 1)[0]
    return first if first in SamplingParams.__dataclass_fields__ or first == "messages" else None
