"""The end of the server, as a model's process learns of it: Triton itself lets requests in until it is gone."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from stillhouse.engine.errors import EngineClosed


class Ending:
    """What `file` says (see protocol.py): nothing while it is not there. `look` is called many times a second."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._cut_at_s: float | None = None

    def look(self) -> None:
        """Reads the file, where it has come since the last time."""
        if self._file is None or self._cut_at_s is not None:
            return
        with contextlib.suppress(OSError, ValueError):
            self._cut_at_s = float(self._file.read_text("ascii"))

    @property
    def refusal(self) -> EngineClosed | None:
        """Why no request is taken any more; None while they are."""
        return None if self._cut_at_s is None else EngineClosed("the server is shutting down")

    @property
    def cut(self) -> EngineClosed | None:
        """Why what still runs is ended; None while it may go on."""
        if self._cut_at_s is None or time.monotonic() < self._cut_at_s:
            return None
        return EngineClosed("cut off: the server is shutting down, and its grace time is over")
