"""The server that is attacked, as a person starts it: `stillhouse serve`, with one model and the gateway."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from attacks.wire import Targets
from served import free_port

# No prompts are kept for reuse: at the end, no KV is in use.
ENGINE = {"max_num_seqs": 8, "prefix_slots": 0}


@dataclass(frozen=True, slots=True)
class Running:
    """A server under way: where it is, and its processes by what they are."""

    targets: Targets
    metrics_url: str
    processes: dict[str, psutil.Process]


@contextlib.contextmanager
def serving(repository: Path, model: str) -> Iterator[Running]:
    """`stillhouse serve` on free ports; it ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        mirror = _mirrored(repository, model, Path(folder))
        ports = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        words = ["serve", "--repository", str(mirror), "--openai-port", str(free_port()), "--grace", "5"]
        command = [sys.executable, "-m", "stillhouse.cli.main", *words, *ports, "--log-file", f"{folder}/triton.log"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
            try:
                yield _announced(served)
            finally:
                served.terminate()


def _mirrored(repository: Path, model: str, folder: Path) -> Path:
    """A repository of the one model, with options of its own."""
    place = folder / "repository" / model
    shutil.copytree(repository / model, place, copy_function=os.symlink)
    (place / "engine.json").unlink()
    (place / "engine.json").write_text(json.dumps(ENGINE), "utf-8")
    return place.parent


def _announced(served: subprocess.Popen[str]) -> Running:
    assert served.stdout is not None
    told: dict[str, str] = {}
    for line in served.stdout:
        name, _, value = line.strip().partition(" ")
        told[name] = value.strip()
        if name.startswith("ready"):
            break
    if "openai" not in told:
        raise SystemExit("the server did not come up")
    launcher = psutil.Process(served.pid)
    processes = {"gateway and launcher": launcher}
    for child in launcher.children(recursive=True):
        if child.name().startswith("tritonserver"):
            processes["tritonserver"] = child
        elif child.name().startswith("triton_python"):
            processes["the model's process"] = child
    targets = Targets(told["grpc"], told["http"], told["openai"].removesuffix("/v1"))
    return Running(targets, told["metrics"], processes)


def state(running: Running) -> dict[str, dict[str, int]]:
    """Resident bytes and descriptors of each process that still runs."""
    now = {}
    for name, process in running.processes.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                now[name] = {"rss_bytes": process.memory_info().rss, "descriptors": process.num_fds()}
    return now


def in_use(running: Running) -> dict[str, float]:
    """Requests that run or wait, and the share of the KV cache, as the metrics page says."""
    with urllib.request.urlopen(running.metrics_url, timeout=10) as response:
        page = response.read().decode()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {
        name: sum(float(value) for value in re.findall(rf"^stillhouse_{name}\{{.*\}} (\S+)$", page, re.MULTILINE))
        for name in names
    }
