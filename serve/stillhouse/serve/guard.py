"""The process between the launcher and Triton: whatever ends the launcher, nothing of the server stays.

Started by path with the standard library alone: `python guard.py RUN_DIRECTORY SHM_PREFIX GRACE_S -- COMMAND…`.
Its standard input is a pipe from the launcher. A line `stop` drains the server; so does `stuck`, where a load that
never ends keeps it from ending by itself; `kill` ends it at once; and the end of the pipe (the launcher is gone, by
whatever signal) drains it too. SIGTERM does so as well, and ends at once what drains already. The server dies with the
guard (PDEATHSIG); its children, orphaned when it is killed, become the guard's (subreaper) and are ended by it.

To drain: at SIGTERM Triton 2.51 answers at once that it knows no such model, to clients who are to come again. So the
models' processes are told first, by a file RUN_DIRECTORY/drain: they refuse what is new, cut what still runs after
GRACE_S, and count in RUN_DIRECTORY/under-way-PID what runs. When nothing does, SIGTERM goes out; who has not ended
soon after GRACE_S is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_HEARD_S = 0.2  # until every model has heard of the end, and has refused what came meanwhile
_LAST_WORDS_S = 3.0  # from the end of the grace time to SIGKILL: the errors are sent, the models unloaded
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Triton 2.51 parses JSON by recursion, and keeps a chunked body's pieces on the stack: at the usual 8 MiB a body of
# some hundred thousand brackets ends the server. What is not used of it costs nothing.
_STACK_BYTES = 256 * 2**20
_LIBC = ctypes.CDLL(None, use_errno=True)


def main(arguments: list[str]) -> int:
    """Runs the server to its end and cleans up behind it; returns its exit status."""
    run_directory, shm_prefix, grace_s = Path(arguments[0]), arguments[1], float(arguments[2])
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    told: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append("kill" if told else "stop"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(
        arguments[arguments.index("--") + 1 :], stdin=subprocess.DEVNULL, preexec_fn=_prepare_server
    )
    (run_directory / "server.pid").write_text(f"{server.pid}\n")
    _attend(server, told, grace_s, run_directory)
    _end_orphans()
    remove_shared_memory(shm_prefix)
    shutil.rmtree(run_directory, ignore_errors=True)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def remove_shared_memory(prefix: str) -> None:
    """Removes the shared memory files whose name begins with `prefix`."""
    for file in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            file.unlink()


def _attend(server: subprocess.Popen[bytes], told: list[str], grace_s: float, run_directory: Path) -> None:
    """Waits for the server's end; once told to, has it drain, asks it to end, and forces it soon after `grace_s`."""
    listening, heard_at, cut_at, asked_at = True, float("inf"), float("inf"), float("inf")
    while server.poll() is None:
        if listening:
            listening = _listen(told)
        else:
            time.sleep(0.05)
        now = time.monotonic()
        last_words_s = (asked_at if "stuck" in told else cut_at) + _LAST_WORDS_S
        if "kill" in told or now > last_words_s:
            server.kill()
        elif told and cut_at == float("inf"):
            heard_at, cut_at = now + _HEARD_S, now + grace_s
            _tell_models(run_directory, cut_at)
        elif asked_at == float("inf") and now > heard_at and (now > cut_at + 1.0 or not _busy(run_directory)):
            server.terminate()
            asked_at = now


def _tell_models(run_directory: Path, cut_at: float) -> None:
    with contextlib.suppress(OSError):  # a full disk: then nobody is told, and the server drains by itself
        beside = run_directory / "drain.new"
        beside.write_text(f"{cut_at}\n")
        beside.rename(run_directory / "drain")


def _busy(run_directory: Path) -> bool:
    counts = []
    for file in run_directory.glob("under-way-*"):
        with contextlib.suppress(OSError):  # its process has ended
            counts.append(file.read_bytes())
    return any(not count or any(count) for count in counts)  # empty: it had no room to count


def _listen(told: list[str]) -> bool:
    """Takes what the launcher says within 50 ms; false once it has nothing more to say."""
    if not select.select([0], [], [], 0.05)[0]:
        return True
    words = os.read(0, 256).decode().split()
    told.extend(words or ["stop"])
    return bool(words)


def _end_orphans() -> None:
    """Kills and reaps what became this process's child when the server died."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _prepare_server() -> None:
    # Runs in the server between fork and exec. The guard has one thread, so "parent" means the guard.
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = _STACK_BYTES if most == resource.RLIM_INFINITY else min(_STACK_BYTES, most)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
