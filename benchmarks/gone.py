"""Clients that go away, in four ways: when the slot is free again that they had. Part of bad_day.py.

All slots but one are taken by streams that stay, and the last one by a stream that does not end either, while another
request waits. The figure is the time from its client's going to the other's first token, so it holds that one's prefill
too, and what is left of the running step: `idle_ttft_ms` is what the same request takes where a slot is free.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from stillhouse.client import Client
from stillhouse.serve.launcher import Server
from stillhouse.serve.openai import running_gateway

WAYS = {
    "cancel": "a cancelled stream",
    "sigkill": "a killed client",
    "http": "a closed HTTP stream",
    "gateway": "a closed connection to the gateway",
}
PROMPT = "Count: one, two,"
_ENDLESS: dict[str, Any] = {"max_tokens": 4000, "temperature": 0, "ignore_eos": True}
_SHORT: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
_IDLE_TRIES = 10
# Clients in a process of their own, which can be killed: a line once each of them has its first token.
_CLIENTS = """
import asyncio, sys
from stillhouse.client import AsyncClient
async def ask(client):
    first = True
    async for token in client.stream(sys.argv[2], "Count: one, two,", max_tokens=4000, temperature=0, ignore_eos=True):
        if first:
            print(flush=True)
        first = False
async def main():
    async with AsyncClient(sys.argv[1], timeout_s=None) as client:
        await asyncio.gather(*(ask(client) for _ in range(int(sys.argv[3]))))
asyncio.run(main())
"""
Leave = Callable[[], object]


def gone(server: Server, repository: Path, model: str, tries: int, ways: Sequence[str], slots: int) -> dict[str, Any]:
    """For each way to go from a server of `slots`: when the slot was free again, in milliseconds."""
    plain = {"text_input": PROMPT, "stream": True, "sampling_parameters": json.dumps(_ENDLESS)}
    chat = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    with running_gateway(server, repository, grace_s=0.0) as gateway, staying(server, model, slots - 1):
        take: dict[str, Callable[[], Leave]] = {
            "cancel": partial(take_by_grpc, server, model),
            "sigkill": partial(take_by_process, server, model),
            "http": partial(take_by_tcp, server.http_url, f"/v2/models/{model}/generate_stream", plain),
            "gateway": partial(
                take_by_tcp, gateway.url, "/v1/chat/completions", chat | {"max_tokens": 1500, "ignore_eos": True}
            ),
        }
        idle = [first_token_s(server, model) for _ in range(_IDLE_TRIES)]
        figures: dict[str, Any] = {"slots": slots, "idle_ttft_ms": round(1000 * median(idle), 1)}
        for way in ways:
            figures[way] = milliseconds([slot_free_s(server, model, take[way]) for _ in range(tries)])
            print(slots, way, figures[way], file=sys.stderr, flush=True)
    return figures


@contextlib.contextmanager
def staying(server: Server, model: str, count: int) -> Iterator[None]:
    """`count` streams that go on for the time of a `with` block."""
    if not count:
        yield
        return
    process = clients(server, model, count)
    try:
        yield
        if process.poll() is not None:
            raise SystemExit("the streams that were to stay have ended")
    finally:
        process.kill()
        process.wait()


def clients(server: Server, model: str, count: int) -> subprocess.Popen[bytes]:
    """A process with `count` streams, each of which has had its first token."""
    command = [sys.executable, "-c", _CLIENTS, server.grpc_url, model, str(count)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(count):
        process.stdout.readline()
    return process


def slot_free_s(server: Server, model: str, take: Callable[[], Leave]) -> float:
    """From the going of who has the slot to the first token of who waits for it."""
    leave, came_s = take(), list[float]()

    def wait() -> None:
        first_token_s(server, model)
        came_s.append(time.perf_counter())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    if came_s:
        raise SystemExit("the slot was not taken")
    left_s = time.perf_counter()
    leave()
    waiting.join()
    return came_s[0] - left_s


def first_token_s(server: Server, model: str) -> float:
    with Client(server.grpc_url) as client:
        return next(client.stream(model, PROMPT, **_SHORT)).time_s


def take_by_grpc(server: Server, model: str) -> Leave:
    client = Client(server.grpc_url)
    tokens = client.stream(model, PROMPT, **_ENDLESS)
    next(tokens)
    return tokens.close


def take_by_process(server: Server, model: str) -> Leave:
    return clients(server, model, 1).kill


def take_by_tcp(url: str, path: str, body: dict[str, Any]) -> Leave:
    """A stream over a bare connection."""
    address, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    connection.sendall(head.encode() + data)
    while b"data:" not in connection.recv(65536):
        pass
    return connection.close


def milliseconds(values_s: list[float]) -> dict[str, float]:
    if not values_s:
        return {"tries": 0}
    return {
        "tries": len(values_s),
        "median_ms": round(1000 * median(values_s), 1),
        "p95_ms": round(1000 * percentile(values_s), 1),
        "max_ms": round(1000 * max(values_s), 1),
    }


def percentile(values: list[float]) -> float:
    """The 95th."""
    return quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]
