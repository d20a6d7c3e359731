"""A stage as a child process: a command line of its own, its stdout and stderr kept, its last error handed on."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from stillhouse.engine.errors import StillhouseError, UsageError

log = logging.getLogger(__name__)

PRINTED, LOG = "stdout.txt", "stderr.txt"
_PR_SET_PDEATHSIG = 1
_NOISE = ("error: ", "hint: ")


def run_stage(name: str, command: Sequence[str], folder: Path) -> None:
    """Runs `command`, whose output goes into `folder`; what it says on the way is said here, too.

    Raises UsageError or StillhouseError with the error that it ended with. It dies with this process.
    """
    with (folder / PRINTED).open("wb") as printed, (folder / LOG).open("w", 1, "utf-8") as kept:
        parent = os.getpid()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: _die_with(parent),
        )
        try:
            said = _listen(child, kept.write)
            code = child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)
            if child.poll() is None:
                child.kill()
                child.wait()
            raise
    if code:
        error, hint = said.get("error: "), said.get("hint: ")
        kind = UsageError if code == UsageError.exit_code and error else StillhouseError
        raise kind(f"{name}: {error or _ending(code)}", hint=hint or f"its whole output is in {folder / LOG}")


def _listen(child: subprocess.Popen[bytes], keep: Callable[[str], object]) -> dict[str, str]:
    """Passes on what the child says until it ends; the error and hint that it said last are returned instead."""
    said: dict[str, str] = {}
    for raw in child.stderr or ():
        line = raw.decode("utf-8", "replace").rstrip()
        keep(f"{line}\n")
        noise = next((word for word in _NOISE if line.startswith(word)), None)
        if noise:
            said[noise] = line.removeprefix(noise)
        elif line:
            log.info("  %s", line)
    return said


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, most likely because memory ran out"
    return f"its process ended with code {code}"


def _die_with(parent: int) -> None:
    """In the child: asks Linux for SIGKILL when `parent` dies, and ends at once where it is dead already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
