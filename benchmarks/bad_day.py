"""What a server does on a bad day, in figures: clients that go, ten times the load, a model's process that is killed.

    python benchmarks/bad_day.py                       # 50 tries of each way to go, the overload, 10 kills
    python benchmarks/bad_day.py --tries 5 --only cancel overload
    python benchmarks/bad_day.py --only killed --write-docs

Gone: an endless stream has the only slot, and another request waits for it. The figure is the time from the first
client's going to the other's first token, so it holds that one's prefill too (`idle_ttft_ms` is what that takes).
Overload: as many clients as there are slots and places in the queue, then ten times as many, who come again a second
after a refusal. Killed: see killed.py. Prints a table; what is not measured this time stays in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlsplit

from stillhouse.client import AsyncClient, Client, ClientError, Overloaded
from stillhouse.serve.launcher import Server, running_server
from stillhouse.serve.openai import running_gateway

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, two_columns
from killed import TITLES, killed
from machine import describe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs/serve.md"
PROMPT = "Count: one, two,"
ENDLESS: dict[str, Any] = {"max_tokens": 4000, "temperature": 0, "ignore_eos": True}
SHORT: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
ANSWER: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
SLOTS, TIMES = 4, 10
QUEUE = SLOTS  # as many may wait where nothing else is said
WAYS = {
    "cancel": "a cancelled stream",
    "sigkill": "a killed client",
    "http": "a closed HTTP stream",
    "gateway": "a closed connection to the gateway",
}
PARTS = [*WAYS, "overload", "killed"]
BEGIN, END = "<!-- bad day: begin -->", "<!-- bad day: end -->"
# A client in a process of its own, which can be killed.
CLIENT = """
import sys
from stillhouse.client import Client
for token in Client(sys.argv[1]).stream(sys.argv[2], "Count: one, two,", max_tokens=4000, ignore_eos=True):
    print(flush=True)
"""
Leave = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--model", default="support-int4")
    parser.add_argument("--tries", type=int, help="default: 50 of each way to go, 10 kills")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of the two loads")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/bad_day.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    options = parser.parse_args()
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "threads": len(os.sched_getaffinity(0)),
        "model": options.model,
        "figures": before.get("figures", {}) | measure(options),
    }
    publish(report, markdown(report), options.out, [DOCS] if options.write_docs else [], BEGIN, END)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the parts that were asked for, by part."""
    figures: dict[str, Any] = {}
    if ways := [way for way in WAYS if way in options.only]:
        with serving(options, {"max_num_seqs": 1, "prefix_slots": 0}) as server:
            figures |= gone(server, options, ways)
    if "overload" in options.only:
        with serving(options, {"max_num_seqs": SLOTS}) as server:
            figures["overload"] = overload(server, options)
    if "killed" in options.only:
        seen = killed(options.repository, options.model, options.tries or 10)
        times = {name: milliseconds(values) for name, values in vars(seen).items() if name != "failures"}
        figures["killed"] = times | {"failed": seen.failures[:10]}
    return figures


def markdown(report: dict[str, Any]) -> str:
    """The figures as a table, p95 and the longest."""
    figures, rows = report["figures"], list[tuple[str, str]]()
    for way in (way for way in WAYS if way in figures):
        rows.append((f"slot free after {WAYS[way]}", _spread(figures[way])))
    if "idle_ttft_ms" in figures:
        rows.append(("the same request to an idle server", f"{figures['idle_ttft_ms']:,.0f} ms"))
    if of := figures.get("overload"):
        clients, over = of["over"]["clients"], of["over"]
        rows += [
            (f"{clients} clients on {of['slots']} slots and {of['queue']} places: refused", f"{over['refused']:,}"),
            ("refused after", _spread(over["refused_after"])),
            ("p95 time to first token of the admitted, against that at full load", f"{of['ttft_ratio']:.2f}"),
            ("failed otherwise", str(len(of["failed"]))),
        ]
    if of := figures.get("killed"):
        rows += [(f"model killed: {title}", _spread(of[name])) for name, title in TITLES.items()]
        rows.append(("model killed: what should not have been", str(len(of["failed"]))))
    return two_columns(rows, report, f"{report['model']}; p95, and the longest of so many tries")


def _spread(of: dict[str, float]) -> str:
    if not of["tries"]:
        return "–"
    return f"{of['p95_ms']:,.0f} ms ({of['max_ms']:,.0f}; {of['tries']})"


@contextlib.contextmanager
def serving(options: argparse.Namespace, engine: dict[str, int | None]) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "triton.log"
        with running_server(options.repository, models=[options.model], engine=engine, log_file=log_file) as server:
            yield server


# Clients that go away


def gone(server: Server, options: argparse.Namespace, ways: list[str]) -> dict[str, Any]:
    """For each way to go: when the slot was free again, in milliseconds."""
    model = options.model
    plain = {"text_input": PROMPT, "stream": True, "sampling_parameters": json.dumps(ENDLESS)}
    chat = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "stream": True}
    with running_gateway(server, options.repository, grace_s=0.0) as gateway:
        take: dict[str, Callable[[], Leave]] = {
            "cancel": partial(take_by_grpc, server, model),
            "sigkill": partial(take_by_process, server, model),
            "http": partial(take_by_tcp, server.http_url, f"/v2/models/{model}/generate_stream", plain),
            "gateway": partial(
                take_by_tcp, gateway.url, "/v1/chat/completions", chat | {"max_tokens": 1500, "ignore_eos": True}
            ),
        }
        idle = [first_token_s(server, model) for _ in range(10)]
        figures: dict[str, Any] = {"idle_ttft_ms": round(1000 * median(idle), 1)}
        for way in ways:
            figures[way] = milliseconds([slot_free_s(server, model, take[way]) for _ in range(options.tries or 50)])
            print(way, figures[way], file=sys.stderr, flush=True)
    return figures


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
        return next(client.stream(model, PROMPT, **SHORT)).time_s


def take_by_grpc(server: Server, model: str) -> Leave:
    client = Client(server.grpc_url)
    tokens = client.stream(model, PROMPT, **ENDLESS)
    next(tokens)
    return tokens.close


def take_by_process(server: Server, model: str) -> Leave:
    process = subprocess.Popen([sys.executable, "-c", CLIENT, server.grpc_url, model], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process.kill


def take_by_tcp(url: str, path: str, body: dict[str, Any]) -> Leave:
    """A stream over a bare connection."""
    address, data = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection = socket.create_connection((address.hostname or "", address.port or 0))
    connection.sendall(head.encode() + data)
    while b"data:" not in connection.recv(65536):
        pass
    return connection.close


# More than it can carry


@dataclass
class Seen:
    """What the clients of a load met."""

    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def overload(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    full = asyncio.run(load(server, options, SLOTS + QUEUE))
    over = asyncio.run(load(server, options, TIMES * (SLOTS + QUEUE)))
    p95_full, p95_over = percentile(full.ttft_s), percentile(over.ttft_s)
    return {
        "slots": SLOTS,
        "queue": QUEUE,
        "full": {"clients": SLOTS + QUEUE, "answered": len(full.ttft_s), "ttft_p95_ms": round(1000 * p95_full)},
        "over": {
            "clients": TIMES * (SLOTS + QUEUE),
            "answered": len(over.ttft_s),
            "ttft_p95_ms": round(1000 * p95_over),
            "refused": len(over.refused_s),
            "refused_after": milliseconds(over.refused_s),
        },
        "ttft_ratio": round(p95_over / p95_full, 2),
        "failed": [*full.failures, *over.failures][:10],
    }


async def load(server: Server, options: argparse.Namespace, clients: int) -> Seen:
    """`clients` ask again and again for `options.seconds`; whoever is refused comes again a second later."""
    seen, end_s = Seen(), time.perf_counter() + options.seconds
    async with AsyncClient(server.grpc_url) as client:
        await asyncio.gather(*(ask_until(end_s, client, options.model, seen) for _ in range(clients)))
    return seen


async def ask_until(end_s: float, client: AsyncClient, model: str, seen: Seen) -> None:
    while time.perf_counter() < end_s:
        await ask_once(client, model, seen)


async def ask_once(client: AsyncClient, model: str, seen: Seen) -> None:
    first: float | None = None
    begun_s = time.perf_counter()
    try:
        async for token in client.stream(model, PROMPT, **ANSWER):
            first = token.time_s if first is None else first
    except Overloaded:
        seen.refused_s.append(time.perf_counter() - begun_s)
        await asyncio.sleep(1.0)
    except ClientError as error:
        seen.failures.append(f"{type(error).__name__}: {error}")
    else:
        seen.ttft_s.append(first or 0.0)


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


if __name__ == "__main__":
    sys.exit(main())
