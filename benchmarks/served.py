"""A server as people start it, `stillhouse serve` in processes of its own, and what one can see of it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_LINE = re.compile(r"^(http|grpc|metrics|openai) +(\S+)$")
END_TIMEOUT_S = 90
_SHM = Path("/dev/shm")
_SHM_PREFIX = re.compile(r"shm-region-prefix-name=(\S+)")
_FIGURE = re.compile(r"^stillhouse_(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$", re.M)
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Served:
    """A running server; `openai_url` ends with /v1."""

    model: str
    launcher: subprocess.Popen[str]
    grpc_url: str
    http_url: str
    metrics_url: str
    openai_url: str

    def processes(self) -> dict[str, psutil.Process]:
        """By what they do: the launcher (with the gateway in it), its guard, Triton, the model's process."""
        roles = {"launcher": psutil.Process(self.launcher.pid)}
        for process in roles["launcher"].children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline()[:4])
                for role, mark in (("guard", "guard.py"), ("model", "backend_stub"), ("triton", "bin/tritonserver")):
                    if mark in command:
                        roles.setdefault(role, process)
                        break
        return roles

    def figures(self) -> dict[str, float]:
        """What Triton's metrics page says of running and waiting requests, and of the KV cache's use."""
        with _LOCAL.open(self.metrics_url, timeout=10) as response:
            return {name: float(value) for name, value in _FIGURE.findall(response.read().decode())}

    def shm_prefix(self) -> str:
        """What the names of the server's files in /dev/shm begin with."""
        found = _SHM_PREFIX.search(" ".join(self.processes()["triton"].cmdline()))
        assert found is not None
        return found[1]


def shm_files(prefix: str) -> dict[str, int]:
    """The files of shared memory by name, in bytes."""
    return {file.name: file.stat().st_size for file in _SHM.glob(f"{prefix}*")}


@contextlib.contextmanager
def served(model_directory: Path, engine: dict[str, Any] | None = None) -> Iterator[Served]:
    """`stillhouse serve` on one model, for the time of a `with` block; `engine` goes on top of its engine.json.

    At the end it gets a SIGTERM. Raises SystemExit where it does not start, or does not end well.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-served-") as folder:
        model = _with_options(model_directory.resolve(), Path(folder) / "repository", engine or {})
        openai_port, log_file = free_port(), Path(folder) / "triton.log"
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", str(openai_port)]
        command = [sys.executable, "-m", "stillhouse.cli.main", "serve", "--repository", str(model.parent), *ports]
        launcher = subprocess.Popen([*command, "--log-file", str(log_file)], stdout=subprocess.PIPE, text=True)
        try:
            yield Served(model.name, launcher, **_addresses(launcher, log_file))
        except BaseException:
            launcher.terminate()
            launcher.wait(timeout=END_TIMEOUT_S)
            raise
        launcher.terminate()
        if launcher.wait(timeout=END_TIMEOUT_S) != 0:
            raise SystemExit(f"the server ended with status {launcher.returncode}")


def _addresses(launcher: subprocess.Popen[str], log_file: Path) -> dict[str, str]:
    assert launcher.stdout is not None
    found: dict[str, str] = {}
    for line in launcher.stdout:
        if match := _LINE.match(line.strip()):
            found[f"{match[1]}_url"] = match[2]
        if line.startswith("ready"):
            return found
    log = log_file.read_text("utf-8", "replace") if log_file.is_file() else ""
    raise SystemExit(f"the server did not start:\n{log[-2000:]}")


def _with_options(model: Path, repository: Path, engine: dict[str, Any]) -> Path:
    """A copy of `model` below `repository`, its versions' files as links, with engine options of its own."""
    copy = repository / model.name
    copy.mkdir(parents=True)
    for version in model.iterdir():
        if version.name.isdecimal():
            shutil.copytree(version, copy / version.name, copy_function=os.symlink)
    shutil.copy(model / "config.pbtxt", copy / "config.pbtxt")
    options = json.loads((model / "engine.json").read_text("utf-8")) | engine
    (copy / "engine.json").write_text(json.dumps(options), "utf-8")
    return copy


def free_port() -> int:
    """A port of the loopback that nobody listens on: to `serve`, --openai-port 0 means no gateway."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
