"""The errors of the client, drawn as a tree.

ClientError             anything that can go wrong with a call; `hint` says what to do
├── InvalidCall         the call itself is wrong (a URL, a prompt): nothing was sent
├── ConnectionFailed    nobody listens at the address, or the connection went before the first token
├── RequestRejected     the server refused the request: a bad parameter, a prompt that is too long
│   └── ModelNotFound   no such model or version there
├── Unavailable         the server is there, but cannot answer now: not ready, failed
│   └── Overloaded      its queue is full
├── TimedOut            no answer in time, or no next token in time
└── StreamBroken        the answer began, but did not come to its end
"""

from __future__ import annotations


class ClientError(Exception):
    """One clear line about what happened; `hint` says what to do.

    `kind`: what the model's backend says that it was (see `from_server`); None where somebody else speaks.
    """

    def __init__(self, message: str, *, hint: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.kind = kind


class InvalidCall(ClientError):
    """The call itself is wrong: nothing was sent."""

    exit_code = 2  # of the command line: a usage error


class ConnectionFailed(ClientError):
    """Nobody listens at the address, or the connection went before the first token."""


class RequestRejected(ClientError):
    """The server refused the request."""


class ModelNotFound(RequestRejected):
    """No such model or version on this server."""


class Unavailable(ClientError):
    """The server is there, but cannot answer now."""


class Overloaded(Unavailable):
    """The server's queue is full: later, or with fewer requests at a time, it answers."""


class TimedOut(ClientError):
    """No answer in time, or no next token in time."""


class StreamBroken(ClientError):
    """The answer began, but did not come to its end."""


def from_server(message: str, where: str, default: type[ClientError] = RequestRejected) -> ClientError:
    """The error for what a server said about `where` (a model, or its own address).

    Inside a stream there is nothing but a text. One of stillhouse's backend begins with its kind; the rest of it may
    hold anything that a request has said. `default` is what the status code says, and stands where the text says no
    more.
    """
    kind_said = message.partition(": ")[0]
    if (known := _KINDS.get(kind_said)) is not None:
        return known(f"{where}: {message}", hint=_HINTS.get(known), kind=kind_said)
    lowered = message.lower()
    kind = default
    if "unknown model" in lowered or ("model" in lowered and "not found" in lowered):
        kind = ModelNotFound
    elif any(words in lowered for words in _NOT_NOW):
        kind = Unavailable
    return kind(f"{where}: {message.rstrip('.')}", hint=_HINTS.get(kind))


# What stillhouse's backend begins an error with (serve/errors.py).
_KINDS: dict[str, type[ClientError]] = {
    "Error generating stream": RequestRejected,
    "invalid request": RequestRejected,
    "prompt too long": RequestRejected,
    "queue full": Overloaded,
    "out of time": TimedOut,
    "shut down": Unavailable,
    "internal error": Unavailable,
}
# Triton's words.
_NOT_NOW = ("is not healthy", "not ready", "not at ready state", "server is stopping")

_HINTS: dict[type[ClientError], str] = {
    ModelNotFound: "Client.models() lists the models and versions of this server",
    Overloaded: "ask again in a moment, or send fewer requests at a time",
    Unavailable: "the server is there, but this failed; its log says why, and asking again later may help",
}
