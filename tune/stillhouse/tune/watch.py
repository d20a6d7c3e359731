"""A run is watched: what its history says (go on, stop, diverged), the live line, TensorBoard.

What stops a run is decided from the history alone, which is saved with every checkpoint: so a resumed run decides as
an uninterrupted one does.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

EVERY_S = 10.0
_SPEED = "train_tokens_per_second"
History = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a run ends before its last step; `good_step` is the last step before the loss went astray."""

    kind: str  # "early" or "diverged"
    reason: str
    good_step: int


def losses(history: History) -> list[tuple[int, float]]:
    """The training loss of every step, in nats a token."""
    return [(int(row["step"]), float(row["loss"])) for row in history if "loss" in row]


def validation_losses(history: History) -> list[tuple[int, float]]:
    """The validation loss of every evaluation, in nats a token."""
    return [(int(row["step"]), float(row["eval_loss"])) for row in history if "eval_loss" in row]


def best_step(history: History) -> int | None:
    """The step of the lowest validation loss, the first of several; None where there is none."""
    found = validation_losses(history)
    return min(found, key=lambda pair: (pair[1], pair[0]))[0] if found else None


def calm_step(history: History, window: int) -> int:
    """The last step of the `window` steps whose mean training loss is lowest."""
    steps = losses(history)
    means = _window_means([loss for _, loss in steps], window)
    return steps[int(means.argmin()) + window - 1][0] if len(means) else (steps[-1][0] if steps else 0)


class Judge:
    """Reads a history row by row, each once; its first verdict is its last.

    A run ends early where the validation loss has not improved for `patience` evaluations (0: never). It has diverged
    where a loss or gradient is not finite, or where the mean loss of the last `window` steps is more than `rise` nats
    above the lowest mean of any earlier window. With FP16's loss scaling a gradient may well be infinite: then
    `gradients` are not judged.
    """

    def __init__(self, *, patience: int, window: int, rise: float, gradients: bool = True) -> None:
        self._patience, self._window, self._rise = patience, window, rise
        self._names = {"loss": "the training loss", "eval_loss": "the validation loss"}
        self._names |= {"grad_norm": "the gradient"} if gradients else {}
        self._newest: deque[float] = deque(maxlen=window)  # losses
        self._means: deque[tuple[float, int]] = deque(maxlen=window)  # of the newest windows, each with its last step
        self._lowest = (math.inf, 0)  # of the windows before those
        self._best: tuple[float, int] | None = None  # validation loss, step
        self._not_better = 0
        self.verdict: Verdict | None = None

    def read(self, row: Mapping[str, Any]) -> Verdict | None:
        """The verdict once `row` is known: None where the run may go on."""
        if self.verdict is None:
            self.verdict = self._not_finite(row) or self._risen(row) or self._no_better(row)
        return self.verdict

    def _not_finite(self, row: Mapping[str, Any]) -> Verdict | None:
        for key, name in self._names.items():
            if key in row and not math.isfinite(row[key]):
                return Verdict("diverged", f"{name} is {row[key]} at step {row['step']}", int(row["step"]) - 1)
        return None

    def _risen(self, row: Mapping[str, Any]) -> Verdict | None:
        if "loss" not in row:
            return None
        self._newest.append(float(row["loss"]))
        if len(self._newest) < self._window:
            return None
        if len(self._means) == self._window:  # the oldest mean's window ends before this one begins
            self._lowest = min(self._lowest, self._means[0])
        now, step = math.fsum(self._newest) / self._window, int(row["step"])
        self._means.append((now, step))
        lowest, good = self._lowest
        if now - lowest <= self._rise:
            return None
        reason = f"the training loss rose from {lowest:.3f} (mean of the {self._window} steps to {good}) "
        return Verdict("diverged", reason + f"to {now:.3f} (to step {step})", good)

    def _no_better(self, row: Mapping[str, Any]) -> Verdict | None:
        if not self._patience or "eval_loss" not in row:
            return None
        if self._best is None or row["eval_loss"] < self._best[0]:
            self._best, self._not_better = (float(row["eval_loss"]), int(row["step"])), 0
            return None
        self._not_better += 1
        if self._not_better < self._patience:
            return None
        loss, step = self._best
        times = self._patience
        return Verdict("early", f"validation loss {loss:.4f} at step {step} was not improved {times} times", step)


def _window_means(values: list[float], window: int) -> NDArray[np.float64]:
    """The mean of every `window` values in a row."""
    if len(values) < window:
        return np.empty(0)
    means: NDArray[np.float64] = np.convolve(values, np.full(window, 1 / window), "valid")
    return means


class Line(Protocol):
    """Who shows how far a run is."""

    def show(self, done: int, steps: int, words: str) -> None: ...

    def close(self) -> None: ...


class BarLine:
    """One live line on a terminal: bar, step, losses, tokens a second, time left."""

    def __init__(self, done: int, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[words]}"),
        )
        self._progress = Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._progress.add_task("", total=steps, completed=done, words="")
        self._progress.start()

    def show(self, done: int, steps: int, words: str) -> None:
        self._progress.update(self._task, completed=done, total=steps, words=words)

    def close(self) -> None:
        self._progress.stop()


class LogLine:
    """A log line every EVERY_S seconds and at the end; for logs and pipes."""

    def __init__(self, done: int) -> None:
        self._first, self._began = done, time.monotonic()
        self._said = self._began

    def show(self, done: int, steps: int, words: str) -> None:
        now = time.monotonic()
        if now - self._said < EVERY_S and done < steps:
            return
        self._said = now
        left_s = (now - self._began) / max(1, done - self._first) * (steps - done)
        log.info("step %d/%d  %s  left: %.0f s", done, steps, words, left_s)

    def close(self) -> None:
        return None


def line_for_terminal(done: int, steps: int) -> Line:
    """A live line where stderr is a terminal and nobody asked for quiet, else log lines."""
    if sys.stderr.isatty() and not os.environ.get("STILLHOUSE_QUIET"):
        return BarLine(done, steps)
    return LogLine(done)


def words_of(history: History) -> str:
    """The live line's figures: loss, validation loss and tokens a second, the newest of each."""
    newest: dict[str, float] = {}
    for row in history:
        newest |= {key: row[key] for key in ("loss", "eval_loss", "train_tokens_per_second") if key in row}
    words = [f"loss {newest['loss']:.4f}"] if "loss" in newest else []
    words += [f"validation {newest['eval_loss']:.4f}"] if "eval_loss" in newest else []
    words += [f"{newest[_SPEED]:.0f} tokens/s"] if _SPEED in newest else []
    return "  ".join(words)


def tensorboard(folder: Path, first_step: int) -> Any:
    """A SummaryWriter into `folder`; what was written after `first_step` by a run that was killed is dropped."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)
