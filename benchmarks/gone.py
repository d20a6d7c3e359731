"""Clients that go away, in four ways: when the slot is free again that they had. Part of bad_day.py.

All slots but one are taken by streams that stay, and the last one by a stream that does not end either, while another
request waits. Two times count from its client's going: until the slot was free, and until the other's first token came
out of it. The second is the client's; the first is the same less what the server says that the other took from its
slot to its token (the sums of two of its histograms), so it still holds the token's way to the client.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
_PUBLISHED_S = 0.6  # by then the metrics page has what has happened
_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
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
        time.sleep(_PUBLISHED_S)
        for way in ways:
            times_s = [slot_free_s(server, model, take[way]) for _ in range(tries)]
            figures[way] = milliseconds([free_s for free_s, _ in times_s])
            figures[way]["first_token"] = milliseconds([first_s for _, first_s in times_s])
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


@dataclass(frozen=True, slots=True)
class Answered:
    """What the server's metrics page says of all answers that have come to their end, in seconds."""

    count: int
    queue_s: float
    e2e_s: float

    @staticmethod
    def by(server: Server) -> Answered:
        with _LOCAL.open(server.metrics_url, timeout=10) as response:
            page = response.read().decode()

        def total(name: str) -> float:
            return sum(map(float, re.findall(rf"^stillhouse_{name}{{.*}} (\S+)$", page, re.M)))

        queue, e2e = "request_queue_time_seconds", "e2e_request_latency_seconds"
        return Answered(int(total(f"{queue}_count")), total(f"{queue}_sum"), total(f"{e2e}_sum"))


def slot_free_s(server: Server, model: str, take: Callable[[], Leave]) -> tuple[float, float]:
    """From the going of who has the slot: until it is free, and until the first token of who waits for it."""
    before, leave, came_s = Answered.by(server), take(), list[float]()

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
    first_s = came_s[0] - left_s
    return first_s - in_its_slot_s(server, before), first_s


def in_its_slot_s(server: Server, before: Answered) -> float:
    """What the one answer since `before` took from its slot to its end, once the server has told."""
    deadline_s = time.monotonic() + 10
    while (after := Answered.by(server)).count == before.count:
        if time.monotonic() > deadline_s:
            raise SystemExit("the metrics page does not count the answer")
        time.sleep(0.05)
    if after.count != before.count + 1:
        raise SystemExit("another answer has ended meanwhile")
    return after.e2e_s - before.e2e_s - (after.queue_s - before.queue_s)


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
