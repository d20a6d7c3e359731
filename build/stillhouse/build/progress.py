"""How far a build is: a bar on a terminal, lines in a log; both on stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

EVERY_S = 10.0


class Reporter(Protocol):
    """Who is told how far a build is; below are one for a terminal and one for logs.

    A stage of a count of 0 is none of the build's own: it comes before they are known.
    """

    def stage(self, name: str, index: int, count: int) -> None: ...

    def share(self, share: float) -> None: ...

    def done(self, note: str) -> None: ...


class BarReporter:
    """A bar for the stage under way and a line for each that is done; for a terminal. A context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
            TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._title = ""

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, index: int, count: int) -> None:
        self._title = f"[{index}/{count}] {name}" if count else name
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(self._title.replace("[", "\\["), total=1.0)

    def share(self, share: float) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=share)

    def done(self, note: str) -> None:
        self._progress.console.print(f"{self._title}: {note}", markup=False, highlight=False)


class LineReporter:
    """A log line when a stage begins to take long and one when it is done; for logs and pipes."""

    def __init__(self) -> None:
        self._title = ""
        self._began = self._said = 0.0

    def __enter__(self) -> LineReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stage(self, name: str, index: int, count: int) -> None:
        self._title = f"[{index}/{count}] {name}" if count else name
        self._began = self._said = time.monotonic()

    def share(self, share: float) -> None:
        now = time.monotonic()
        if now - self._said > EVERY_S and share > 0:
            self._said = now
            left_s = (now - self._began) * (1 - share) / share
            log.info("%s: %.0f%%, about %.0f s left", self._title, 100 * share, left_s)

    def done(self, note: str) -> None:
        log.info("%s: %s", self._title, note)


def reporter_for_terminal() -> BarReporter | LineReporter:
    """A bar where stderr is a terminal and nobody asked for quiet, else log lines."""
    if sys.stderr.isatty() and not os.environ.get("STILLHOUSE_QUIET"):
        return BarReporter()
    return LineReporter()
