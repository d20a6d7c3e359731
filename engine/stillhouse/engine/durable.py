"""Files that are there, whole, also after the power was lost."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Writes `file` in UTF-8 and returns when its content has reached the disk; its name: `sync_directory`."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_atomically(file: Path, text: str) -> None:
    """Writes beside, fsyncs, renames: a reader sees the old text or the new one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    write_text(beside, text)
    beside.replace(file)


def sync_directory(directory: Path) -> None:
    """Returns when the names in `directory` (what was made, renamed, removed) have reached the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
