"""A stage in a process of its own: torch's and ONNX Runtime's memory goes when it ends, and its chatter into a log.

The parent starts `python -m stillhouse.build.worker`, writes one JSON job to its stdin and reads one JSON object a
line from its stdout: {"share": 0…1} while it works, then {"result": …} or {"error": …, "hint": …}.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stillhouse.engine.errors import StillhouseError

# stage -> function(progress, **arguments) -> JSON-able result
STAGES = {
    "merge": "stillhouse.build.merge:merge",
    "unpack": "stillhouse.build.prequantized:unpack",
    "export": "stillhouse.build.export:export",
    "calibrate": "stillhouse.build.calibrate:calibrate",
    "quantize": "stillhouse.build.auto:quantize",
    "convert_fp16": "stillhouse.build.quantize:convert_fp16",
    "reference": "stillhouse.build.verify:reference",
    "fidelity": "stillhouse.build.verify:fidelity",
    "answers": "stillhouse.build.answers:answers",
    "probe": "stillhouse.build.verify:probe",
}

Share = Callable[[float], None]
KILLED = "the process was killed, most likely because memory ran out"  # what SIGKILL says
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class StageRun:
    """What a stage gave back, the most memory it held (resident set, bytes), and its seconds on all processors."""

    result: dict[str, Any]
    peak_rss_bytes: int
    cpu_seconds: float


def run_stage(
    stage: str, arguments: dict[str, Any], *, log: Path, share: Share, temporary: Path | None = None
) -> StageRun:
    """Runs `stage` in a child process; what the child prints goes to `log`, its temporary files into `temporary`.

    Raises StillhouseError, the child's own where it gave one. The child dies with its parent.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "stillhouse.build.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=_environment(temporary),
            start_new_session=True,
        )
        try:
            answer = _talk(child, {"stage": stage, "arguments": arguments}, share)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        finally:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
    if "result" in answer:
        # The child says what it held: of a child of a large process, the system counts what that one held at the fork.
        peak_rss_bytes = answer["peak_rss_bytes"] or usage.ru_maxrss * 1024
        return StageRun(answer["result"], peak_rss_bytes, round(usage.ru_utime + usage.ru_stime, 3))
    if "error" in answer:
        raise StillhouseError(answer["error"], hint=answer.get("hint") or f"its whole output is in {log}")
    if child.returncode == -signal.SIGKILL:
        raise StillhouseError(
            f"{stage}: {KILLED}",
            hint="'stillhouse build --dry-run' says what a build needs",
        )
    raise StillhouseError(f"{stage}: the process ended with code {child.returncode}", hint=f"see {log}")


def _environment(temporary: Path | None) -> dict[str, str]:
    own = {"STILLHOUSE_WORKER_PARENT": str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"}
    # Threads that spin at a barrier cost minutes where the cores are shared.
    own |= {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
    own |= {"TMPDIR": str(temporary)} if temporary is not None else {}
    return os.environ | own


def _talk(child: subprocess.Popen[bytes], job: dict[str, Any], share: Share) -> dict[str, Any]:
    """Sends the job, passes shares on, and returns the last line: a result, an error, or {} where none came."""
    stdin, stdout = child.stdin, child.stdout
    if stdin is None or stdout is None:
        return {}
    with contextlib.suppress(BrokenPipeError):
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.close()
    last: dict[str, Any] = {}
    for line in stdout:
        message = json.loads(line)
        if "share" in message:
            share(float(message["share"]))
        else:
            last = message
    return last


def main() -> int:
    """The child's side."""
    die_with(int(os.environ.get("STILLHOUSE_WORKER_PARENT", "0")))
    answers = _take_stdout()
    job = json.loads(sys.stdin.readline())
    try:
        module, _, name = STAGES[job["stage"]].partition(":")
        function = getattr(importlib.import_module(module), name)
        result = function(lambda share: _say(answers, {"share": round(share, 4)}), **job["arguments"])
    except StillhouseError as error:
        _say(answers, {"error": str(error), "hint": error.hint})
    except OSError as error:
        _say(answers, {"error": f"{job['stage']}: {error}", "hint": _space_hint(error)})
    except Exception as error:  # the process's boundary: the log has the traceback, people get a line
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        reason = f"{job['stage']} failed: {type(error).__name__}: {lines[0]}"
        _say(answers, {"error": reason, "hint": _space_hint(error)})
    else:
        _say(answers, {"result": result, "peak_rss_bytes": _peak_rss_bytes()})
        return 0
    return 1


def _peak_rss_bytes() -> int | None:
    """The most that this program has had resident; None where the system does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return None


def _say(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _take_stdout() -> IO[str]:
    """Keeps the real stdout for answers and sends whatever libraries print to stderr, which is the log."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def die_with(parent: int) -> None:
    """In the child: asks Linux for SIGKILL when `parent` dies, and ends at once where it is dead already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _space_hint(error: Exception) -> str | None:
    """What to do about a full disk; libraries in C++ and Rust say so in their text alone."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or any(words in str(error) for words in ("No space left", "File too large")):
        return "free some disk space; 'stillhouse build --dry-run' says what a build needs"
    return None


if __name__ == "__main__":
    sys.exit(main())
