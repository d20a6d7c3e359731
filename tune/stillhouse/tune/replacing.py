"""A result's folder is replaced whole: at any moment of a crash the earlier result or the new one is there.

The earlier one steps aside to `.NAME-old`. Whoever finds that without a NAME puts it back: nothing is lost in between.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stillhouse.build.locks import clear_unheld, held_temporary
from stillhouse.engine.directory import locked
from stillhouse.engine.durable import sync_directory
from stillhouse.engine.errors import UsageError


def restore(output: Path) -> None:
    """Puts the earlier result back where a replacement was killed half-way; clears it where the new one stands."""
    if not output.parent.is_dir():
        return
    with locked(output.parent):
        _restore(output)


def hold_replaceable(output: Path, mark: str, maker: str) -> None:
    """Raises UsageError where something lies at `output` that is not a result of `maker`, which has a file `mark`."""
    if output.exists() and not (output / mark).is_file():
        raise UsageError(
            f"{output} exists and is no result of {maker} (it has no {mark}): it is never replaced",
            hint="name another output, or move it away",
        )


@contextlib.contextmanager
def beside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` to build a result in; what dead runs left of theirs is cleared."""
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}-new-"
    clear_unheld(output.parent, prefix)
    with held_temporary(output.parent, prefix) as folder:
        yield folder


def put(folder: Path, output: Path) -> None:
    """Renames `folder`, once its files are on the disk, to `output`; what was there goes when the new one stands."""
    sync_tree(folder)
    with locked(output.parent):
        _restore(output)
        try:
            if output.exists():
                output.rename(_aside(output))
            folder.rename(output)
        except BaseException:
            _restore(output)
            raise
        sync_directory(output.parent)
        _restore(output)


def sync_tree(folder: Path) -> None:
    """Returns when all files below `folder`, and their names, have reached the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        elif path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_directory(folder)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}-old")


def _restore(output: Path) -> None:
    aside = _aside(output)
    if not aside.exists():
        return
    if output.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(output)
