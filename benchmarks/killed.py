"""A model's process, or Triton, is killed with SIGKILL under streams: when each hears of it, and is answered again.

Part of bad_day.py. Triton itself neither ends a dead model's streams nor starts its process again; `stillhouse serve`
does, and starts Triton again.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from served import free_port

from stillhouse.client import AsyncClient, ClientError

STREAMS = 2  # of each kind
# Part: what its rows are called, and who is killed by turns, by how the processes' names begin.
VICTIMS = {
    "killed": ("model killed", ["triton_python_"]),
    "killed_triton": ("Triton killed", ["tritonserver"]),
    "killed_again": ("one server, both killed by turns", ["triton_python_", "tritonserver"]),
}
_SOUND_AFTER_S = 11.0  # a death that follows a repair sooner is repaired later
TITLES = {
    "grpc_error_s": "the error of a gRPC stream",
    "gateway_error_s": "the error of a gateway's stream",
    "health_503_s": "/health says 503",
    "grpc_again_s": "answered again over gRPC",
    "gateway_again_s": "answered again by the gateway",
}
_GIVE_UP_S = 60.0
_PROMPT = "Count: one, two,"
_ENDLESS: dict[str, Any] = {"max_tokens": 4000, "temperature": 0, "ignore_eos": True}


@dataclass
class Tries:
    """Seconds from the kill, over all tries; `failures` are what should not have been."""

    grpc_error_s: list[float] = field(default_factory=list)
    gateway_error_s: list[float] = field(default_factory=list)
    health_503_s: list[float] = field(default_factory=list)
    grpc_again_s: list[float] = field(default_factory=list)
    gateway_again_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def killed(repository: Path, model: str, part: str, tries: int) -> Tries:
    """Each try has a server of its own, but for those by turns, with some seconds between them."""
    seen, (what, names) = Tries(), VICTIMS[part]
    a_server = 1 if len(names) == 1 else tries
    for first in range(0, tries, a_server):
        with served(repository, model) as (command, urls):
            for number in range(first, first + a_server):
                if number > first:
                    time.sleep(_SOUND_AFTER_S)
                asyncio.run(_one_try(command, names[number % len(names)], urls, model, seen))
                print(f"{what}: try {number + 1} of {tries}", file=sys.stderr, flush=True)
    return seen


@contextmanager
def served(repository: Path, model: str) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
    """`stillhouse serve` on free ports, and its URLs as it says them."""
    with tempfile.TemporaryDirectory() as folder:
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--openai-port", str(free_port())]
        words = ["serve", "--repository", str(repository), "--models", model, *ports, "--log-file", f"{folder}/log"]
        command = [sys.executable, "-m", "stillhouse.cli.main", *words, "--grace", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            urls: dict[str, str] = {}
            for line in process.stdout:
                word, _, rest = line.strip().partition(" ")
                urls[word] = rest.strip()
                if line.startswith("ready"):
                    break
            try:
                yield psutil.Process(process.pid), urls
            finally:
                process.terminate()


async def _one_try(command: psutil.Process, victim: str, urls: dict[str, str], model: str, seen: Tries) -> None:
    running = [asyncio.Event() for _ in range(2 * STREAMS)]
    async with (
        AsyncClient(urls["grpc"]) as client,
        httpx.AsyncClient(base_url=urls["page"], timeout=_GIVE_UP_S) as http,
    ):
        over_grpc = [asyncio.create_task(_grpc_error(client, model, event, seen)) for event in running[:STREAMS]]
        over_http = [asyncio.create_task(_gateway_error(http, model, event, seen)) for event in running[STREAMS:]]
        await asyncio.gather(*(event.wait() for event in running))
        for process in _alive(command, victim):
            process.kill()
        killed_s = time.perf_counter()
        told_s = asyncio.create_task(_until(lambda: _status(http, "/health", 503), 0.02))
        again = [
            asyncio.create_task(_until(lambda: _grpc_answers(client, model), 0.05)),
            asyncio.create_task(_until(lambda: _gateway_answers(http, model, seen), 0.05)),
        ]
        seen.grpc_error_s += [await task - killed_s for task in over_grpc]
        seen.gateway_error_s += [await task - killed_s for task in over_http]
        seen.health_503_s.append(await told_s - killed_s)
        seen.grpc_again_s.append(await again[0] - killed_s)
        seen.gateway_again_s.append(await again[1] - killed_s)


async def _grpc_error(client: AsyncClient, model: str, running: asyncio.Event, seen: Tries) -> float:
    """When a stream of our client ended with an error."""
    try:
        async for _ in client.stream(model, _PROMPT, **_ENDLESS):
            running.set()
        seen.failures.append("a gRPC stream came to its end")
    except ClientError:
        pass
    return time.perf_counter()


async def _gateway_error(http: httpx.AsyncClient, model: str, running: asyncio.Event, seen: Tries) -> float:
    """When a stream of the gateway ended with an error event."""
    body = {"model": model, "messages": [{"role": "user", "content": _PROMPT}], "stream": True, **_ENDLESS}
    event: dict[str, Any] = {}
    async with http.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 1500}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                running.set()
                event = json.loads(line.removeprefix("data: "))
    if event.get("error", {}).get("code") != "service_unavailable":
        seen.failures.append(f"a stream of the gateway ended with {event}")
    return time.perf_counter()


async def _until(holds: Callable[[], Awaitable[bool]], every_s: float) -> float:
    """When it came to hold. Raises TimeoutError where it never does."""
    given_up_s = time.perf_counter() + _GIVE_UP_S
    while not await holds():
        if time.perf_counter() > given_up_s:
            raise TimeoutError
        await asyncio.sleep(every_s)
    return time.perf_counter()


async def _status(http: httpx.AsyncClient, path: str, wanted: int) -> bool:
    return (await http.get(path)).status_code == wanted


async def _grpc_answers(client: AsyncClient, model: str) -> bool:
    try:
        await client.generate(model, _PROMPT, max_tokens=1, temperature=0, timeout_s=5.0)
    except ClientError:
        return False
    return True


async def _gateway_answers(http: httpx.AsyncClient, model: str, seen: Tries) -> bool:
    """Whether it answers; what is refused meanwhile is refused with 503 and Retry-After."""
    answer = await http.post("/v1/completions", json={"model": model, "prompt": _PROMPT, "max_tokens": 1})
    if answer.status_code != 200 and (answer.status_code != 503 or "retry-after" not in answer.headers):
        seen.failures.append(f"a new request got {answer.status_code}: {answer.text[:200]}")
    return answer.status_code == 200


def _alive(command: psutil.Process, name: str) -> list[psutil.Process]:
    children = command.children(recursive=True)
    return [child for child in children if child.name().startswith(name) and child.status() != "zombie"]
