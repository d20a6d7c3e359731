"""The errors of stillhouse's rooms, drawn as a tree.

StillhouseError                 anything a person can do something about: one line, and a hint
├── UsageError                  the request itself is wrong (a bad key, a bad value): exit code 2
├── VersionError                a version directory that is missing, foreign, or not whole
│   ├── NotThereError           what was named does not exist: exit code 2, as for all that is named wrongly
│   └── TamperedError           a file's sha256 differs from the manifest
└── EngineError                 the engine cannot do what was asked
    ├── InvalidRequest          a parameter that is unknown, ill-typed or out of range
    │   └── PromptTooLong       more tokens than the context holds
    ├── QueueFull               the bounded queue has no place left
    └── EngineClosed            the engine was shut down, or its loop failed
"""

from __future__ import annotations

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_LONGEST = 200


def shown(value: Any) -> str:
    """The value as an error's line shows it: in short, however long or deep it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


class StillhouseError(Exception):
    """One clear line about what rule was broken and by what; `hint` says what to do.

    `exit_code` is what the command line ends with: 1 for a failure, 2 for wrong usage.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(StillhouseError):
    """What was asked for is not a thing that can be asked for."""

    exit_code = 2


class VersionError(StillhouseError):
    """A version directory that is missing, foreign, or not whole."""


class NotThereError(VersionError):
    """A repository or a version that was named, and does not exist."""

    exit_code = 2


class TamperedError(VersionError):
    """A file of a version differs from what its manifest says."""


class EngineError(StillhouseError):
    """The engine cannot do what was asked."""


class InvalidRequest(EngineError):
    """A parameter that is unknown, ill-typed or out of range."""

    exit_code = 2


class PromptTooLong(InvalidRequest):
    """The prompt and what is to be generated do not fit into the context."""


class QueueFull(EngineError):
    """The bounded queue has no place left."""


class DeadlineExceeded(EngineError):
    """No whole answer within the request's time."""


class EngineClosed(EngineError):
    """The engine was shut down, or its loop failed."""
