"""A real Triton, started once for all tests that only ask, and what asks it; and `stillhouse serve` as a command."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc

from stillhouse.serve.launcher import Server, running_server

MODELS = ("support-fp16", "support-int8", "support-int4")


@pytest.fixture(scope="session")
def triton(support_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the three precisions."""
    log_file = tmp_path_factory.mktemp("triton") / "triton.log"
    with running_server(support_repository, models=MODELS, log_file=log_file) as server:
        yield server


@pytest.fixture(scope="session")
def narrow_triton(support_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose one model decodes one sequence at a time."""
    log_file = tmp_path_factory.mktemp("narrow") / "triton.log"
    engine = {"max_num_seqs": 1}
    with running_server(support_repository, models=["support-int4"], engine=engine, log_file=log_file) as server:
        yield server


def post_json(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and body of a POST; an event stream's body is the list of its events."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
            if response.headers["Content-Type"].startswith("text/event-stream"):
                return response.status, [
                    json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")
                ]
            return response.status, json.loads(text)
    except urllib.error.HTTPError as error:
        # /generate_stream sends its error as an event.
        return error.code, json.loads(error.read().decode().removeprefix("data: "))


@pytest.fixture
def post(triton: Server) -> Callable[..., tuple[int, Any]]:
    """Posts to `/v2/models/MODEL/ACTION` of the server with the three precisions."""
    return lambda action, body, model="support-int4": post_json(f"{triton.http_url}/v2/models/{model}/{action}", body)


def tensor(name: str, value: Any) -> grpc.InferInput:
    """An input tensor as tritonclient's users make it: a text, a boolean, or a list of ids."""
    if isinstance(value, str):
        array, kind = np.array([value.encode()], dtype=np.object_), "BYTES"
    elif isinstance(value, bool):
        array, kind = np.array([value]), "BOOL"
    else:
        array, kind = np.array(value, np.int32), "INT32"
    made = grpc.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


class Stream:
    """A gRPC stream with one request on it."""

    def __init__(self, server: Server, model: str, tensors: dict[str, Any], **options: Any) -> None:
        self.results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client = grpc.InferenceServerClient(server.grpc_url.removeprefix("grpc://"))
        self.client.start_stream(lambda result, error: self.results.put((result, error)))
        self.client.async_stream_infer(model, [tensor(name, value) for name, value in tensors.items()], **options)

    def next(self, timeout_s: float = 60.0) -> Any:
        """The next result. Raises the InferenceServerException that came instead."""
        result, error = self.results.get(timeout=timeout_s)
        if error is not None:
            raise error
        return result

    def until_final(self) -> Iterator[Any]:
        """Results up to the one marked as final (needs enable_empty_final_response)."""
        while True:
            result = self.next()
            yield result
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def close(self, *, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


@contextlib.contextmanager
def stream(server: Server, model: str, tensors: dict[str, Any], **options: Any) -> Iterator[Stream]:
    opened = Stream(server, model, tensors, **options)
    try:
        yield opened
    finally:
        opened.close(cancel=True)


@pytest.fixture
def open_stream() -> Callable[..., contextlib.AbstractContextManager[Stream]]:
    """Opens a gRPC stream to (server, model, tensors, **options of async_stream_infer)."""
    return stream


@pytest.fixture
def metric() -> Callable[..., float]:
    """The value of a stillhouse metric of a server, 0 where it has no line: metric(server, name, **labels)."""

    def read(server: Server, name: str, **labels: str) -> float:
        with urllib.request.urlopen(server.metrics_url, timeout=10) as response:
            page = response.read().decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [
            line
            for line in page.splitlines()
            if line.startswith((f"stillhouse_{name}{{", f"stillhouse_{name} ")) and all(w in line for w in wanted)
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    return read


@dataclass
class Command:
    """`stillhouse serve` in a process of its own, with all its traces below one directory."""

    process: subprocess.Popen[str]
    home: Path
    http_url: str
    grpc_url: str
    metrics_url: str
    gateway_url: str | None

    @property
    def run_directory(self) -> Path:
        (run,) = self.home.glob("stillhouse-*/run-*")
        return run


@pytest.fixture
def processes_below() -> Callable[[Path], list[int]]:
    """The processes that name a directory in their command line: guard, server and models."""

    def find(directory: Path) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and os.fsencode(directory) in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
        return found

    return find


@pytest.fixture
def free_ports() -> list[str]:
    """Options of `stillhouse serve` that take free ports."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    return ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", port]


@pytest.fixture
def serving(free_ports: list[str]) -> Callable[..., contextlib.AbstractContextManager[Command]]:
    """The command on free ports, once it has said that it is ready: serving(repository, home, *options)."""

    @contextlib.contextmanager
    def serve(repository: Path, home: Path, *options: str) -> Iterator[Command]:
        home.mkdir(exist_ok=True)
        arguments = ["serve", "--repository", str(repository), "--models", "support-int4", *free_ports, *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "stillhouse.cli.main", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(home), "XDG_STATE_HOME": str(home / "state")},
        )
        assert process.stdout is not None
        said: dict[str, str] = {}
        try:
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                said[word] = rest.strip()
                if word.startswith("ready"):
                    break
            assert "http" in said, process.stderr.read() if process.stderr else ""
            yield Command(process, home, said["http"], said["grpc"], said["metrics"], said.get("page"))
        finally:
            process.kill()
            process.communicate()

    return serve


@pytest.fixture
def status_of() -> Callable[[str], int]:
    """The status of a GET."""

    def ask(url: str) -> int:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    return ask
