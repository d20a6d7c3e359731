"""Run directories: one private directory for each running server, and the end of those whose guard was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import tempfile
import time
from pathlib import Path

from stillhouse.serve.errors import ServeError
from stillhouse.serve.guard import remove_shared_memory

_LOCK = "lock"
_YOUNG_S = 60.0


def runs_directory() -> Path:
    """The directory of all runs of this user; made, and checked to be private, when needed."""
    directory = Path(tempfile.gettempdir()) / f"stillhouse-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise ServeError(f"{directory} belongs to another user", hint="set TMPDIR to a directory of your own")
    return directory


def new_run_directory() -> tuple[Path, int]:
    """A fresh run directory, and the descriptor of its lock; whoever keeps that open keeps the run alive."""
    directory = runs_directory() / f"run-{secrets.token_hex(6)}"
    directory.mkdir(mode=0o700)
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return directory, lock


def shm_prefix(run_directory: Path) -> str:
    """The prefix of the run's files in /dev/shm."""
    return f"stillhouse_{run_directory.name.removeprefix('run-')}_"


def remove_leftovers() -> list[Path]:
    """Ends what runs without a living guard left behind: processes, shared memory, directories."""
    gone = [directory for directory in runs_directory().glob("run-*") if _is_abandoned(directory)]
    for directory in gone:
        for process in _processes_naming(directory):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        remove_shared_memory(shm_prefix(directory))
        shutil.rmtree(directory, ignore_errors=True)
    return gone


def _is_abandoned(directory: Path) -> bool:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # Just being made or removed, or else it was never finished.
        with contextlib.suppress(FileNotFoundError):
            return time.time() - directory.stat().st_mtime > _YOUNG_S
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _processes_naming(directory: Path) -> list[int]:
    """The processes that have `directory` in their command line: the server and its models."""
    wanted, found = os.fsencode(directory), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found
