"""A stage as a child process: a command line of its own, its stdout and stderr kept, its last error handed on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from stillhouse.build.worker import KILLED, die_with
from stillhouse.engine.errors import StillhouseError, UsageError

log = logging.getLogger(__name__)

PRINTED, LOG = "stdout.txt", "stderr.txt"
GRACE_S = 30.0  # what a child that has heard Ctrl-C too may take to put back what it was changing
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
            preexec_fn=lambda: die_with(parent),
        )
        try:
            said = _listen(child, kept.write)
            code = child.wait()
        except BaseException as stopped:
            _end(child, heard=isinstance(stopped, KeyboardInterrupt))
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


def _end(child: subprocess.Popen[bytes], *, heard: bool) -> None:
    """Ends the child, each time with a stronger signal; one that has `heard` the terminal's may end by itself first."""
    for signalled in (None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)[0 if heard else 1 :]:
        if signalled is not None:
            child.send_signal(signalled)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=GRACE_S if signalled is None else 5)  # which reads what it says: it never waits
            return


def _ending(code: int) -> str:
    return KILLED if code == -signal.SIGKILL else f"the process ended with code {code}"
