from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent.parent
LOCUSTFILE = TESTS.parent / "loadtest" / "locustfile.py"


@dataclass
class SmallServer:
    """A running tests/client/small_server.py."""

    process: subprocess.Popen[str]
    grpc_port: int
    http_port: int
    openai_port: int

    @property
    def openai_host(self) -> str:
        return f"http://127.0.0.1:{self.openai_port}"

    @property
    def grpc_host(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_host(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.http_host}/log") as response:
            entries: list[dict[str, Any]] = json.load(response)
        return entries

    def kill(self) -> None:
        with self.process:  # closes its pipe and waits
            self.process.kill()


def start_server(*arguments: str) -> SmallServer:
    """First token after 200 ms, then one every 20 ms, 11 tokens: 400 ms in all."""
    script = TESTS / "client" / "small_server.py"
    command = [sys.executable, str(script), "--tokens", "11", "--first-s", "0.2", "--gap-s", "0.02", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return SmallServer(process, **json.loads(process.stdout.readline()))


@pytest.fixture
def server() -> Iterator[SmallServer]:
    server = start_server()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[SmallServer]:
    """The same, for the tests of a whole file."""
    server = start_server()
    yield server
    server.kill()


@pytest.fixture
def slotted_server() -> Iterator[SmallServer]:
    """One that answers two at a time, in 0.2 s each."""
    server = start_server("--slots", "2", "--tokens", "3", "--first-s", "0.1", "--gap-s", "0.05")
    yield server
    server.kill()


@pytest.fixture
def guarded_server() -> Iterator[SmallServer]:
    """One whose OpenAI API wants the key "secret"."""
    server = start_server("--api-key", "secret")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def foreign_server() -> Iterator[SmallServer]:
    """One whose Triton models take a text alone."""
    server = start_server("--no-messages", "--first-s", "0.01")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def uncounted_server() -> Iterator[SmallServer]:
    """One whose Triton models count no tokens, give no finish reason, and end with an empty response."""
    server = start_server("--no-messages", "--no-counts", "--first-s", "0.01")
    yield server
    server.kill()


@pytest.fixture
def locust(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs plain locust on the repository's locustfile, in a folder of its own."""

    def run(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST")}
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    return run
