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
from collections.abc import Sequence
from pathlib import Path

from stillhouse.serve.errors import ServeError
from stillhouse.serve.guard import remove_shared_memory
from stillhouse.serve.processes import stat_of
from stillhouse.serve.protocol import DRAIN_FILE

_LOCK = "lock"
_LAUNCHER = "launcher.pid"
_YOUNG_S = 60.0
_GONE_S = 5.0  # until what was killed has let go of its ports


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
    (directory / _LAUNCHER).write_text(f"{os.getpid()}\n")
    return directory, lock


def shm_prefix(run_directory: Path) -> str:
    """The prefix of the run's files in /dev/shm."""
    return f"stillhouse_{run_directory.name.removeprefix('run-')}_"


def remove_leftovers() -> list[Path]:
    """Ends what runs without a living guard left behind: processes, shared memory, directories."""
    gone = [directory for directory in runs_directory().glob("run-*") if _is_abandoned(directory)]
    for directory in gone:
        until_s = time.monotonic() + _GONE_S
        while (processes := _processes_naming(directory)) and time.monotonic() < until_s:
            for process in processes:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        remove_shared_memory(shm_prefix(directory))
        shutil.rmtree(directory, ignore_errors=True)
    return gone


def is_ending(ports: Sequence[int]) -> bool:
    """Whether a run that has one of `ports` is coming to its end; one whose launcher was killed is ended at once."""
    ending = False
    for directory in runs_directory().glob("run-*"):
        for process in _processes_naming(directory):
            with contextlib.suppress(OSError, ValueError):
                command = (Path("/proc") / str(process) / "cmdline").read_text().split("\0")
                if not any(word.endswith("guard.py") for word in command[:3]):
                    continue
                if not any(word.endswith(f"-port={port}") for word in command for port in ports):
                    continue
                launcher = int((directory / _LAUNCHER).read_text())
                if orphaned := int(stat_of(process)[1]) != launcher:
                    os.kill(process, signal.SIGTERM)
                ending |= orphaned or (directory / DRAIN_FILE).exists()
    return ending


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
