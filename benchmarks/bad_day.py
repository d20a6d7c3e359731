"""What a server does on a bad day, in figures: clients that go, ten times the load, processes that are killed.

    python benchmarks/bad_day.py                       # 50 tries of each way to go, the overload, 10 of each kill
    python benchmarks/bad_day.py --tries 5 --only gone overload --ways cancel
    python benchmarks/bad_day.py --only killed --write-docs

Gone: see gone.py; with one slot, and with as many as a server has by default. Overload: as many clients as there are
slots and places in the queue, then ten times as many, who come again a second after a refusal. Killed: see killed.py.
Prints a table; what is not measured this time stays in the results.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stillhouse.client import AsyncClient, ClientError, Overloaded
from stillhouse.engine.options import EngineOptions
from stillhouse.serve.launcher import Server, running_server

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, two_columns
from gone import PROMPT, WAYS, gone, milliseconds, percentile
from killed import TITLES, VICTIMS, killed
from machine import describe

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs/serve.md"
ANSWER: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
SLOTS, TIMES = 4, 10
QUEUE = SLOTS  # as many may wait where nothing else is said
CROWDS = {"gone": 1, "gone_from_full": EngineOptions().max_num_seqs}  # part: slots
PARTS = [*CROWDS, "overload", *VICTIMS]
BEGIN, END = "<!-- bad day: begin -->", "<!-- bad day: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--model", default="support-int4")
    parser.add_argument("--tries", type=int, help="default: 50 of each way to go, 10 kills")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each of the two loads")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to go")
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
        "figures": merged(before.get("figures", {}), measure(options)),
    }
    publish(report, markdown(report), options.out, [DOCS] if options.write_docs else [], BEGIN, END)
    return 0


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is measured now beside what was before: by part, and of clients that go by their way to go."""
    kept = {part: of for part, of in before.items() if part in PARTS}
    return kept | {part: kept.get(part, {}) | of if part in CROWDS else of for part, of in now.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the parts that were asked for, by part."""
    figures: dict[str, Any] = {}
    for part, slots in CROWDS.items():
        if part in options.only:
            with serving(options, {"max_num_seqs": slots, "prefix_slots": 0}) as server:
                tries = options.tries or 50
                figures[part] = gone(server, options.repository, options.model, tries, options.ways, slots)
    if "overload" in options.only:
        with serving(options, {"max_num_seqs": SLOTS}) as server:
            figures["overload"] = overload(server, options)
    for part in VICTIMS:
        if part in options.only:
            seen = killed(options.repository, options.model, part, options.tries or 10)
            times = {name: milliseconds(values) for name, values in vars(seen).items() if name != "failures"}
            figures[part] = times | {"failed": seen.failures[:10]}
    return figures


def markdown(report: dict[str, Any]) -> str:
    """The figures as a table, p95 and the longest."""
    figures, rows = report["figures"], list[tuple[str, str]]()
    for of in (figures[part] for part in CROWDS if part in figures):
        where = "" if of["slots"] == 1 else f", of {of['slots']} slots taken"
        for way in (way for way in WAYS if way in of):
            rows.append((f"slot free after {WAYS[way]}{where}", _spread(of[way])))
            if first := of[way].get("first_token"):  # not in figures from before the two were told apart
                rows.append((f"first token of who waited for it{where}", _spread(first)))
        rows.append((f"the same request to a free slot{where}", f"{of['idle_ttft_ms']:,.0f} ms"))
    if of := figures.get("overload"):
        clients, over = of["over"]["clients"], of["over"]
        rows += [
            (f"{clients} clients on {of['slots']} slots and {of['queue']} places: refused", f"{over['refused']:,}"),
            ("refused after", _spread(over["refused_after"])),
            ("p95 time to first token of the admitted, against that at full load", f"{of['ttft_ratio']:.2f}"),
            ("failed otherwise", str(len(of["failed"]))),
        ]
    for of, (what, _) in ((figures[part], victim) for part, victim in VICTIMS.items() if part in figures):
        rows += [(f"{what}: {title}", _spread(of[name])) for name, title in TITLES.items()]
        rows.append((f"{what}: what should not have been", str(len(of["failed"]))))
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


if __name__ == "__main__":
    sys.exit(main())
