from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class SmallServer:
    """A running small_server.py."""

    process: subprocess.Popen[str]
    grpc_port: int
    http_port: int

    def url(self, scheme: str) -> str:
        return f"{scheme}://127.0.0.1:{self.http_port if scheme == 'http' else self.grpc_port}"

    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url('http')}/log") as response:
            entries: list[dict[str, Any]] = json.load(response)
        return entries

    def kill(self) -> None:
        with self.process:  # closes its pipe and waits
            self.process.kill()


def start_server(*arguments: str) -> SmallServer:
    script = Path(__file__).with_name("small_server.py")
    process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ports = json.loads(process.stdout.readline())
    return SmallServer(process, ports["grpc_port"], ports["http_port"])


@pytest.fixture(scope="session")
def small_server() -> Iterator[SmallServer]:
    server = start_server()
    yield server
    server.kill()


@pytest.fixture
def mortal_server() -> Iterator[SmallServer]:
    """A server that a test may kill."""
    server = start_server()
    yield server
    server.kill()


@pytest.fixture(params=["grpc", "http"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)
