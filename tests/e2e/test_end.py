"""How a server ends: by SIGTERM, Ctrl-C, or SIGKILL of each part; nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tritonclient.utils import InferenceServerException

from stillhouse.client import Client, ClientError
from stillhouse.serve.leftovers import shm_prefix

pytestmark = pytest.mark.triton

# Those of conftest.py, which is not to be imported.
Command = Any
Serving = Callable[..., contextlib.AbstractContextManager[Command]]
ProcessesBelow = Callable[[Path], list[int]]
LONG = {
    "text_input": "Count: one, two,",
    "stream": True,
    "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 40, "ignore_eos": True}),
}


def assert_nothing_left(command: Command, shm: str, processes_below: ProcessesBelow) -> None:
    assert processes_below(command.home) == []
    assert list(Path("/dev/shm").glob(f"{shm}*")) == []
    assert list(command.home.glob("stillhouse-*/run-*")) == []
    assert not listens(command.http_url)
    assert not listens(command.grpc_url)


def listens(url: str) -> bool:
    host, port = url.split("://")[1].split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_everything(
    support_repository: Path, tmp_path: Path, number: signal.Signals, serving: Serving, processes_below: ProcessesBelow
) -> None:
    with serving(support_repository, tmp_path / "home") as command:
        shm = shm_prefix(command.run_directory)
        assert len(processes_below(command.home)) >= 2
        command.process.send_signal(number)
        assert command.process.wait(30) == 0
        assert_nothing_left(command, shm, processes_below)


def test_running_streams_come_to_their_end(
    support_repository: Path, tmp_path: Path, open_stream: Any, serving: Serving
) -> None:
    with serving(support_repository, tmp_path / "home", "--grace", "20") as command:
        with open_stream(command, "support-int4", LONG, enable_empty_final_response=True) as opened:
            opened.next()
            command.process.terminate()
            assert len(list(opened.until_final())) == 39
        assert command.process.wait(30) == 0


@pytest.mark.slow
def test_what_is_new_is_refused_at_once_and_what_runs_too_long_is_cut_by_name(
    support_repository: Path,
    tmp_path: Path,
    open_stream: Any,
    wait_until: Callable[..., float],
    serving: Serving,
    status_of: Callable[[str], int],
    processes_below: ProcessesBelow,
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
        assert_nothing_left(command, shm, processes_below)


@pytest.mark.slow
def test_a_client_that_keeps_an_idle_stream_open_does_not_hold_the_server(
    support_repository: Path, tmp_path: Path, open_stream: Any, serving: Serving, processes_below: ProcessesBelow
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
        assert_nothing_left(command, shm, processes_below)


@pytest.mark.slow
def test_when_the_launcher_is_killed_everything_ends(
    support_repository: Path,
    tmp_path: Path,
    open_stream: Any,
    wait_until: Callable[..., float],
    serving: Serving,
    processes_below: ProcessesBelow,
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
        assert_nothing_left(command, shm, processes_below)


@pytest.mark.slow
def test_when_the_guard_is_killed_too_no_process_stays_and_the_next_start_cleans_up(
    support_repository: Path,
    tmp_path: Path,
    open_stream: Any,
    wait_until: Callable[..., float],
    serving: Serving,
    processes_below: ProcessesBelow,
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
