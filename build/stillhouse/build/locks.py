"""Directories that belong to one living process: temporary ones hold a flock, so that a dead build's can be told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held_temporary(parent: Path, prefix: str) -> Iterator[Path]:
    """A new directory `prefix`… below `parent`, locked; removed at the end where it was not renamed meanwhile."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        path.chmod(0o755)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # else another build took it for a leftover before it was locked
                break
        os.close(descriptor)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def clear_unheld(parent: Path, prefix: str) -> None:
    """Removes the directories `prefix`… below `parent` that no living process holds."""
    for leftover in parent.glob(f"{prefix}*"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
