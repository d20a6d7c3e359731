"""What happens when Triton or a model's process ends by itself."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.triton

# Those of conftest.py, which is not to be imported.
Command = Any
Serving = Callable[..., contextlib.AbstractContextManager[Command]]
ProcessesBelow = Callable[[Path], list[int]]
BACK_S = 150  # a server beside other work: that it comes back is what is tested
LONG = {
    "text_input": "Count: one, two,",
    "stream": True,
    "sampling_parameters": json.dumps({"temperature": 0, "max_tokens": 40, "ignore_eos": True}),
}


def test_a_server_that_ends_by_itself_is_started_again_and_its_log_is_kept(
    support_repository: Path,
    tmp_path: Path,
    wait_until: Callable[..., float],
    serving: Serving,
    processes_below: ProcessesBelow,
    status_of: Callable[[str], int],
) -> None:
    with serving(support_repository, tmp_path / "home") as command:
        asked = {"model": "support-int4", "prompt": "Hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{command.gateway_url}/v1/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(int((command.run_directory / "server.pid").read_text()), signal.SIGKILL)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "service_unavailable"
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 503)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200, BACK_S)
        short = {"model": "support-int4", "prompt": "Hello", "max_tokens": 1}
        assert httpx.post(f"{command.gateway_url}/v1/completions", json=short, timeout=60).status_code == 200
        assert list(command.home.rglob("triton-*.log.1"))
        command.process.terminate()
        _, said = command.process.communicate(timeout=60)
        assert command.process.returncode == 0
        assert "the Triton server ended by itself with status 137" in said
        assert processes_below(command.home) == []


@pytest.mark.slow
def test_a_models_process_that_is_killed_is_repaired(
    support_repository: Path,
    tmp_path: Path,
    open_stream: Any,
    wait_until: Callable[..., float],
    serving: Serving,
    processes_below: ProcessesBelow,
    status_of: Callable[[str], int],
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

    with serving(support_repository, tmp_path / "home") as command:
        server = int((command.run_directory / "server.pid").read_text())
        kill_model(server)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 503)
        wait_until(answers, BACK_S)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200, BACK_S)
        assert int((command.run_directory / "server.pid").read_text()) == server

        with open_stream(command, "support-int4", endless, enable_empty_final_response=True) as opened:
            opened.next()  # and at once, before any figure on the metrics page could have told of it
            kill_model(server)
            with pytest.raises(InferenceServerException):
                list(opened.until_final())
        wait_until(answers, BACK_S)
        wait_until(lambda: status_of(f"{command.gateway_url}/health") == 200, BACK_S)
        command.process.terminate()
        assert command.process.wait(60) == 0
        assert processes_below(command.home) == []


@pytest.mark.slow
def test_a_model_that_does_not_come_back_leaves_the_others_served_and_is_tried_again(
    support_repository: Path,
    tmp_path: Path,
    wait_until: Callable[..., float],
    serving: Serving,
    status_of: Callable[[str], int],
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
