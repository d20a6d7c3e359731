"""The errors of serve.

StillhouseError
└── ServeError              the server cannot be started as asked
    ├── PortInUse           somebody else listens there
    ├── TritonNotFound      no tritonserver, or a part of it is missing
    ├── ServerFailed        the server ended, or a model did not load
    ├── LoadHopeless        there is no use in waiting for a load
    └── PromotionFailed     a version did not come up; what was live before is live
"""

from __future__ import annotations

from stillhouse.engine.errors import (
    DeadlineExceeded,
    EngineClosed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StillhouseError,
)

_LONGEST_ERROR = 1000  # in characters


class VllmRefusal(InvalidRequest):
    """What Triton's vLLM backend refuses too: it is told in that backend's very words, which its clients look for."""


# What an error that the backend sends begins with, the narrower class first: inside a stream Triton sends a text alone,
# and what follows may hold whatever the request has said. stillhouse.client reads them.
KINDS: dict[type[StillhouseError], str] = {
    VllmRefusal: "Error generating stream",
    PromptTooLong: "prompt too long",
    InvalidRequest: "invalid request",
    QueueFull: "queue full",
    DeadlineExceeded: "out of time",
    EngineClosed: "shut down",
    StillhouseError: "internal error",
}

# The same, coarser, as the metrics count them.
METRIC_KINDS: dict[type[StillhouseError], str] = {
    InvalidRequest: "invalid",
    QueueFull: "queue_full",
    DeadlineExceeded: "timeout",
    EngineClosed: "shut_down",
    StillhouseError: "internal",
}


class ServeError(StillhouseError):
    """The server cannot be started as asked."""


class PortInUse(ServeError):
    """Somebody else listens on a port that was asked for."""


class TritonNotFound(ServeError):
    """No tritonserver was found, or a part of it is missing."""


class ServerFailed(ServeError):
    """The server ended by itself, or did not come up; `model` is whose fault it was, "" where that is not known."""

    def __init__(self, message: str, *, model: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.model = model


class LoadHopeless(ServeError):
    """There is no use in waiting for a load."""


class PromotionFailed(ServeError):
    """A version did not come up; what was live before is live."""


def one_line(error: StillhouseError) -> str:
    """The error with its hint, as text that can be sent whatever a request has put into it."""
    text = f"{error} ({error.hint})" if error.hint else str(error)
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 1]}…"


def kind_and_line(error: StillhouseError) -> str:
    """As `one_line`, behind the error's kind."""
    return f"{_said_of(error, KINDS)}: {one_line(error)}"


def metric_kind(error: StillhouseError) -> str:
    """The error's kind as the metrics count it."""
    return _said_of(error, METRIC_KINDS)


def _said_of(error: StillhouseError, kinds: dict[type[StillhouseError], str]) -> str:
    return next(said for kind, said in kinds.items() if isinstance(error, kind))
