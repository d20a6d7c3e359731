"""The errors of the load test, drawn as a tree.

LoadtestError           anything a person can do something about; `hint` says what
├── BadInput            a prompt file, an option or a model that cannot be used
└── RunFailed           Locust ended without a result
"""

from __future__ import annotations


class LoadtestError(Exception):
    """One clear line about what happened; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadInput(LoadtestError):
    """A prompt file, an option or a model that cannot be used."""


class RunFailed(LoadtestError):
    """Locust ended without a result."""
