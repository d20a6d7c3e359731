"""Checkpoints of a run, told whole from half: a mark is written, and reaches the disk, after all else has."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from stillhouse.engine.durable import sync_directory, write_text
from stillhouse.tune.replacing import sync_tree

_NAME = re.compile(r"checkpoint-(\d+)")
_WHOLE = "whole"


def step_of(checkpoint: Path) -> int:
    """The step after which it was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def mark_whole(checkpoint: Path) -> None:
    """Says that `checkpoint` is complete; its files reach the disk before the mark does."""
    sync_tree(checkpoint)
    write_text(checkpoint / _WHOLE, "")
    sync_directory(checkpoint)
    sync_directory(checkpoint.parent)


def whole_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints in `run`, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / _WHOLE).is_file()]
    return sorted(found, key=step_of)


def drop_half(run: Path) -> None:
    """Removes what a killed run left half written, or half removed."""
    for path in run.glob("checkpoint-*"):
        if not (path / _WHOLE).is_file():
            shutil.rmtree(path)


def keep(run: Path, steps: set[int], newest: int = 2) -> None:
    """Removes the whole checkpoints but the `newest` and those of `steps`; the mark goes first."""
    for path in whole_checkpoints(run)[:-newest]:
        if step_of(path) not in steps:
            with contextlib.suppress(FileNotFoundError):
                (path / _WHOLE).unlink()
            shutil.rmtree(path, ignore_errors=True)


def last_good(run: Path, good_step: int) -> Path | None:
    """The newest whole checkpoint that was saved no later than `good_step`; None where there is none."""
    whole = whole_checkpoints(run)
    before = [path for path in whole if step_of(path) <= good_step]
    return before[-1] if before else None
