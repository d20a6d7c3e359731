"""The errors of the load test, drawn as a tree.

LoadtestError           anything a person can do something about; `hint` says what
├── BadInput            a prompt file, an option or a model that cannot be used
├── RunFailed           Locust ended without a result, or the server died during the run
└── Missed              the figures are not what was asked for (an objective, a comparison)

What a request may fail with is a ClientError of stillhouse.client, and two more:

RequestRejected
├── KeyRefused          an OpenAI API wants a key, or another one
└── WrongContent        what came back is not what was asked for: another protocol, no token, too many
"""

from __future__ import annotations

from stillhouse.client import RequestRejected


class LoadtestError(Exception):
    """One clear line about what happened; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadInput(LoadtestError):
    """A prompt file, an option or a model that cannot be used."""

    exit_code = 2  # of the command line: a usage error


class RunFailed(LoadtestError):
    """Locust ended without a result, or the server died during the run."""


class Missed(LoadtestError):
    """The figures are not what was asked for."""


class KeyRefused(RequestRejected):
    """An OpenAI API wants a key, or another one."""


class WrongContent(RequestRejected):
    """What came back is not what was asked for."""
