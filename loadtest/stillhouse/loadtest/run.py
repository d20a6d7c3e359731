"""A Locust run in a process of its own (Locust patches the standard library of the process that imports it)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.client.address import parse_url
from stillhouse.loadtest.errors import BadInput, RunFailed
from stillhouse.loadtest.memory import read_memory_bytes
from stillhouse.loadtest.samples import Summary

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
_START_AND_END_S = 60.0  # what Locust may need beyond the run itself


@dataclass(frozen=True)
class LoadResult:
    """What one run measured."""

    model: str
    users: int
    summary: Summary
    memory_bytes: int | None  # the largest that the server reported; None where it reports none

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "users": self.users,
            "memory_bytes": self.memory_bytes,
            "summary": self.summary.to_json(),
        }


def default_metrics_url(host: str) -> str:
    """The metrics page of a Triton server at its default port, on the host that is asked."""
    return f"http://{parse_url(host).host}:8002/metrics"


def run_locust(
    host: str,
    model: str = "",
    *,
    users: int = 4,
    duration_s: float = 15.0,
    max_tokens: int = 64,
    ignore_eos: bool = True,
    prompts: Path | None = None,
    seed: int = 0,
    metrics_url: str | None = None,
) -> LoadResult:
    """Drives `model` at `host` with `users` users for `duration_s` (whole seconds), each asking as soon as it can.

    With `ignore_eos` every answer has `max_tokens` tokens, so that runs compare. Without `model` the server's int4 is
    asked. Raises BadInput where it cannot be tested at all, RunFailed where Locust gave no result.
    """
    if users < 1 or duration_s < 1:
        raise BadInput(f"a run has 1 user and 1 second at least, got {users} users and {duration_s:g} s")
    with tempfile.TemporaryDirectory(prefix="stillhouse-loadtest-") as folder:
        result_path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "locust", "--locustfile", str(_LOCUSTFILE), "--headless", "--only-summary"]
        command += ["--host", host, "--users", str(users), "--spawn-rate", str(users)]
        command += ["--run-time", f"{math.ceil(duration_s)}s", "--loglevel", "WARNING", "--result", str(result_path)]
        command += ["--model", model, "--max-tokens", str(max_tokens), "--seed", str(seed)]
        command += ["--prompts", str(prompts.resolve()) if prompts else ""]
        command += ["--ignore-eos"] if ignore_eos else []
        log_path = Path(folder) / "log.txt"
        memory_bytes = _run(command, log_path, duration_s, metrics_url or default_metrics_url(host), model)
        result = _read_result(result_path, log_path)
    summaries = [Summary.from_json(value) for value in result["summaries"]]
    if len(summaries) != 1:
        raise RunFailed(f"a run measures one model, got {len(summaries)}")
    return LoadResult(summaries[0].model, users, summaries[0], memory_bytes)


def _run(command: list[str], log_path: Path, duration_s: float, metrics_url: str, model: str) -> int | None:
    """Runs Locust to its end; returns the largest memory that the server reported meanwhile."""
    # Neither a locust.conf of the current folder nor Locust's variables shall change the run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST")}
    memory_bytes: int | None = None
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=log_path.parent, env=environment
        )
    ends_s = time.monotonic() + duration_s + _START_AND_END_S
    try:
        while process.poll() is None:
            now_bytes = read_memory_bytes(metrics_url, model)
            memory_bytes = max(filter(None, (memory_bytes, now_bytes)), default=None)
            if time.monotonic() > ends_s:
                raise RunFailed(f"Locust did not end within {_START_AND_END_S:g} s after its run time")
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return memory_bytes


def _read_result(result_path: Path, log_path: Path) -> dict[str, Any]:
    if not result_path.exists():
        lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(f"Locust gave no result: {lines[-1] if lines else 'it said nothing'}")
    result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
    if "error" in result:
        raise BadInput(result["error"], hint=result["hint"])
    return result
