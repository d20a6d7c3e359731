"""How a server ends: by SIGTERM, Ctrl-C, SIGKILL of each part, or because a version is not what it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from stillhouse.client import Client, ClientError
from stillhouse.serve.launcher import Server, running_server
from stillhouse.serve.leftovers import shm_prefix

pytestmark = pytest.mark.triton

with socket.create_server(("127.0.0.1", 0)) as _probe:
    _FREE_PORT = str(_probe.getsockname()[1])
FREE_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", _FREE_PORT]
LONG = {
    "text_input": "Count: one, two,",
    "stream": True,
    "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 40, "ignore_eos": True}),
}


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


def processes_below(directory: Path) -> list[int]:
    """The processes that name `directory` in their command line: guard, server and models."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and os.fsencode(directory) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def listens(url: str) -> bool:
    host, port = url.split("://")[1].split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def assert_nothing_left(command: Command, shm: str) -> None:
    assert processes_below(command.home) == []
    assert list(Path("/dev/shm").glob(f"{shm}*")) == []
    assert list(command.home.glob("stillhouse-*/run-*")) == []
    assert not listens(command.http_url)
    assert not listens(command.grpc_url)


@contextlib.contextmanager
def serving(repository: Path, home: Path, *options: str) -> Iterator[Command]:
    """The command on free ports, once it has said that it is ready."""
    home.mkdir(exist_ok=True)
    arguments = ["serve", "--repository", str(repository), "--models", "support-int4", *FREE_PORTS, *options]
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything(support_repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serving(support_repository, tmp_path / "home") as command:
        shm = shm_prefix(command.run_directory)
        assert len(processes_below(command.home)) >= 2
        command.process.send_signal(number)
        assert command.process.wait(30) == 0
        assert_nothing_left(command, shm)


def test_running_streams_come_to_their_end(support_repository: Path, tmp_path: Path, open_stream: Any) -> None:
    with serving(support_repository, tmp_path / "home", "--grace", "20") as command:
        with open_stream(command, "support-int4", LONG, enable_empty_final_response=True) as opened:
            opened.next()
            command.process.terminate()
            assert len(list(opened.until_final())) == 39
        assert command.process.wait(30) == 0


def test_what_is_new_is_refused_at_once_and_what_runs_too_long_is_cut_by_name(
    support_repository: Path, tmp_path: Path, open_stream: Any, wait_until: Callable[..., float]
) -> None:
    endless = {**LONG, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    chat = {"model": "support-int4", "messages": [{"role": "user", "content": "Count."}], "max_tokens": 4000}

    def is_refused_by_name() -> bool:
        with Client(command.grpc_url) as client:
            try:
                client.generate("support-int4", "Hello", max_tokens=1)
            except ClientError as error:
                return "the server is shutting down" in str(error)
        return False

    with (
        serving(support_repository, tmp_path / "home", "--grace", "4") as command,
        open_stream(command, "support-int4", endless, enable_empty_final_response=True) as opened,
        httpx.stream(
            "POST",
            f"{command.gateway_url}/v1/chat/completions",
            json={**chat, "ignore_eos": True, "stream": True},
            timeout=60,
        ) as response,
    ):
        opened.next()
        lines = response.iter_lines()
        next(lines)
        shm = shm_prefix(command.run_directory)
        command.process.terminate()
        wait_until(lambda: status_of(f"{command.gateway_url}/v1/models") == 503)
        wait_until(is_refused_by_name)
        with pytest.raises(InferenceServerException, match="grace time is over"):
            list(opened.until_final())
        *_, event, done = (line for line in lines if line)
        assert done == "data: [DONE]"
        error = json.loads(event.removeprefix("data: "))["error"]
        assert error["code"] == "service_unavailable"
        assert "grace time is over" in error["message"]
        assert command.process.wait(30) == 0
        assert_nothing_left(command, shm)


def test_a_client_that_keeps_an_idle_stream_open_does_not_hold_the_server(
    support_repository: Path, tmp_path: Path, open_stream: Any
) -> None:
    asked = {**LONG, "sampling_parameters": '{"max_tokens": 1}'}
    with (
        serving(support_repository, tmp_path / "home", "--grace", "1") as command,
        open_stream(command, "support-int4", asked) as opened,
    ):
        opened.next()
        shm = shm_prefix(command.run_directory)
        command.process.terminate()
        assert command.process.wait(15) == 0
        assert_nothing_left(command, shm)


def test_when_the_launcher_is_killed_everything_ends(
    support_repository: Path, tmp_path: Path, open_stream: Any, wait_until: Callable[..., float]
) -> None:
    endless = {**LONG, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    with (
        serving(support_repository, tmp_path / "home", "--grace", "1") as command,
        open_stream(command, "support-int4", endless) as opened,
    ):
        opened.next()
        shm = shm_prefix(command.run_directory)
        command.process.kill()
        command.process.wait()
        wait_until(lambda: not processes_below(command.home), 15)
        assert_nothing_left(command, shm)


def test_when_the_guard_is_killed_too_no_process_stays_and_the_next_start_cleans_up(
    support_repository: Path, tmp_path: Path, open_stream: Any, wait_until: Callable[..., float]
) -> None:
    endless = {**LONG, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    home = tmp_path / "home"
    with serving(support_repository, home) as command, open_stream(command, "support-int4", endless) as opened:
        opened.next()
        shm = shm_prefix(command.run_directory)
        (guard,) = (pid for pid in processes_below(home) if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(command.process.pid, signal.SIGKILL)
        os.kill(guard, signal.SIGKILL)
        wait_until(lambda: not processes_below(home), 15)
    assert list(home.glob("stillhouse-*/run-*")) != []
    with serving(support_repository, home) as command:
        assert list(Path("/dev/shm").glob(f"{shm}*")) == []
        assert shm_prefix(command.run_directory) != shm
        command.process.terminate()
        command.process.wait(30)


def test_a_server_that_ends_by_itself_is_an_error_with_its_log(support_repository: Path, tmp_path: Path) -> None:
    with serving(support_repository, tmp_path / "home") as command:
        os.kill(int((command.run_directory / "server.pid").read_text()), signal.SIGKILL)
        _, said = command.process.communicate(timeout=15)
        assert command.process.returncode == 1
        assert "error: the Triton server ended by itself with status 137" in said
        assert "triton-" in said.split("hint:")[1]
        assert processes_below(command.home) == []


def test_a_models_process_that_is_killed_is_repaired(
    support_repository: Path, tmp_path: Path, open_stream: Any, wait_until: Callable[..., float]
) -> None:
    """First with nothing under way, where it is loaded again; then under a stream, which must not wait for ever."""
    short = {**LONG, "sampling_parameters": '{"max_tokens": 1}'}
    endless = {**LONG, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}

    def kill_model(server: int) -> None:
        (model,) = (child for child in psutil.Process(server).children() if child.status() != psutil.STATUS_ZOMBIE)
        model.kill()

    def answers() -> bool:
        with contextlib.suppress(InferenceServerException), open_stream(command, "support-int4", short) as opened:
            opened.next(timeout_s=20)
            return True
        return False

    with serving(support_repository, tmp_path / "home", "--openai-port", str(free_port())) as command:
        server = int((command.run_directory / "server.pid").read_text())
        kill_model(server)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 503)
        wait_until(answers)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200)
        assert int((command.run_directory / "server.pid").read_text()) == server

        with open_stream(command, "support-int4", endless, enable_empty_final_response=True) as opened:
            opened.next()
            wait_until(lambda: running_requests(command) == 1)
            kill_model(server)
            with pytest.raises(InferenceServerException):
                list(opened.until_final())
        wait_until(answers)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200)
        command.process.terminate()
        assert command.process.wait(30) == 0
        assert processes_below(command.home) == []


@pytest.mark.slow
def test_a_model_that_does_not_come_back_leaves_the_others_served_and_is_tried_again(
    support_repository: Path, tmp_path: Path, wait_until: Callable[..., float]
) -> None:
    repository, ask = tmp_path / "repository", {"prompt": "Hello", "max_tokens": 1}
    for name in ("support-int4", "support-int8"):
        shutil.copytree(support_repository / name, repository / name)
    template = repository / "support-int8" / "1" / "chat_template.jinja"
    sound = template.read_bytes()
    with serving(repository, tmp_path / "home", "--models", "support-int4,support-int8") as command:
        server = int((command.run_directory / "server.pid").read_text())
        url = f"{command.gateway_url}/v1/completions"
        template.write_bytes(b"{# changed #}" + sound)
        for child in psutil.Process(server).children():
            if any("support-int8/" in word for word in child.cmdline()):
                child.kill()
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 503)
        # Long enough for the repair to have failed, and to have been put off.
        time.sleep(3)
        assert httpx.post(url, json=ask | {"model": "support-int4"}, timeout=60).status_code == 200
        assert httpx.post(url, json=ask | {"model": "support-int8"}, timeout=60).status_code == 503
        assert "support-int8" in httpx.get(f"{command.gateway_url}/health").json()["error"]["message"]
        template.write_bytes(sound)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200, 30)
        assert httpx.post(url, json=ask | {"model": "support-int8"}, timeout=60).status_code == 200
        assert int((command.run_directory / "server.pid").read_text()) == server


def running_requests(command: Command) -> float:
    with urllib.request.urlopen(command.metrics_url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("stillhouse_num_requests_running{"))


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_tampered_version_is_refused_by_name_at_the_start(support_repository: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(support_repository / "support-int4", repository / "support-int4")
    (version,) = (repository / "support-int4").glob("[0-9]*")
    weights = version / "model.onnx.data"
    with weights.open("r+b") as stream:
        stream.seek(weights.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", "serve", "--repository", str(repository), *FREE_PORTS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(home), "XDG_STATE_HOME": str(home / "state")},
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert done.returncode == 1
    assert "model.onnx.data differs from its manifest" in errors[0]
    assert errors[1].startswith("hint: build the version again")
    assert "Traceback" not in done.stderr
    assert processes_below(home) == []


def test_engine_options_of_the_command_reach_the_engine(support_repository: Path, tmp_path: Path) -> None:
    with running_server(
        support_repository, models=["support-int4"], engine={"max_model_len": 64}, log_file=tmp_path / "triton.log"
    ) as server:
        status, answer = ask_too_long(server)
    assert status == 400
    assert "the context holds 64" in answer["error"]


def ask_too_long(server: Server) -> tuple[int, Any]:
    body = json.dumps({"text_input": "word " * 80}).encode()
    request = urllib.request.Request(f"{server.http_url}/v2/models/support-int4/generate", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    return refused.value.code, json.loads(refused.value.read())
