"""The time between start and readiness: asks every model a real question, or says why the server did not come up."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.engine.errors import QueueFull
from stillhouse.serve.errors import KINDS, ServeError, ServerFailed
from stillhouse.serve.protocol import LOAD_ERROR_MARK
from stillhouse.serve.under_way import told_under_way

if TYPE_CHECKING:
    from stillhouse.serve.launcher import Server

_QUESTION = {"text_input": "Hello", "sampling_parameters": json.dumps({"max_tokens": 1, "temperature": 0})}
_PROBE_TIMEOUT_S = 30.0
# Errors that Triton logs on every machine without a GPU.
_HARMLESS = re.compile(r"CudaDriverHelper|NVML|DCGM")
# The server is on this machine: a proxy from the environment has no part in it.
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_until_ready(server: Server, timeout_s: float, stop: threading.Event) -> None:
    """Returns once Triton says ready and every live version has answered a question of one token.

    Raises ServerFailed with the reason where the server ends before that, or is not there after `timeout_s`, or where a
    model's process dies, for which Triton would wait for ever.
    """
    deadline = time.monotonic() + timeout_s
    while not _says_ready(server.http_url):
        if (status := server.exit_status()) is not None:
            raise reason_of_failure(server.log_file, status)
        if dead := server.processes.dead():
            raise ServerFailed(
                f"{dead[0]} cannot be loaded: its process died, or was killed",
                model=dead[0].model,
                hint=f"is there memory enough? The server's log: {server.log_file}",
            )
        if time.monotonic() > deadline:
            raise ServerFailed(f"the server was not ready after {timeout_s:g} s", hint=f"its log: {server.log_file}")
        if stop.wait(0.05):
            raise ServeError("stopped before the server was ready")
    for model in server.models:
        for version in model.versions:
            _ask(server, model.name, version)


def _ask(server: Server, model: str, version: int) -> None:
    """One greedy token from the model. Raises ServerFailed, with what the server said, if none comes.

    Where a server is started again its clients are there before this question, and one that they fill up answers.
    """
    url = f"{server.http_url}/v2/models/{model}/versions/{version}/generate"
    request = urllib.request.Request(url, json.dumps(_QUESTION).encode(), {"Content-Type": "application/json"})
    try:
        with _LOCAL.open(request, timeout=_PROBE_TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        if KINDS[QueueFull] in said:
            return
        raise _no_answer(model, version, said) from error
    except TimeoutError as error:
        if sum(told_under_way(server.run_directory).values()) > 1:  # not this one alone
            return
        raise _no_answer(model, version, error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _no_answer(model, version, error) from error
    if "text_output" not in answer:
        raise _no_answer(model, version, answer.get("error", answer))


def _no_answer(model: str, version: int, said: object) -> ServerFailed:
    return ServerFailed(f"{model}/{version} does not answer: {said}", model=model)


def reason_of_failure(log_file: Path, status: int) -> ServerFailed:
    """Why the server ended, from its log: what our backend reported, else Triton's last error."""
    lines = log_file.read_text("utf-8", errors="replace").splitlines()
    for line in lines:
        if line.startswith(LOAD_ERROR_MARK):
            report = json.loads(line.removeprefix(LOAD_ERROR_MARK))
            return ServerFailed(
                f"{report['model']}/{report['version']} cannot be loaded: {report['message']}",
                model=report["model"],
                hint=report["hint"] or f"the server's log: {log_file}",
            )
    lines = [line for line in lines if not _HARMLESS.search(line)]
    errors = [re.sub(r"^E\d+ .*?\] ", "", line).strip('"') for line in lines if re.match(r"E\d{4} ", line)]
    what = errors[0] if errors else (lines[-1] if lines else "it said nothing")
    return ServerFailed(f"the Triton server ended with status {status}: {what}", hint=f"the server's log: {log_file}")


def _says_ready(http_url: str) -> bool:
    try:
        with _LOCAL.open(f"{http_url}/v2/health/ready", timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False
