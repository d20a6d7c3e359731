"""A soak: a real server under a mixed load for minutes or hours; what it holds afterwards must be what it held before.

    python benchmarks/soak.py                       # 10 minutes; the table goes to stdout, benchmarks/results/soak.json
    python benchmarks/soak.py --seconds 3600 --write-docs

Clients of all three doors (Triton's gRPC streams, Triton's HTTP, the gateway) ask in a seeded mixture: short answers,
long ones, sampled ones, prompts that begin alike, streams given up in the middle, requests that are to be refused. Once
a minute they pause, so that the server is at rest: the prompts kept for reuse are brought to a known state, a known
question is asked, and every process is looked at. Before the clock starts there have been 250 requests, so that each
kind has been at each door (some minutes on two cores). Exits 1 where, against the rest after the first minute,

- a process holds over 2% more memory of its own (anonymous; at least 1 MB), or the server as a whole does. Pages of
  files are told, but the system takes and gives them as it likes. The longest prompts come first of all: what ONNX
  Runtime keeps for the largest it has seen is then no growth,
- a descriptor, a file of shared memory, a slot or a byte of the KV cache has not come back, or there are more threads
  than a pool may still have started,
- a request failed that was not to be refused or given up, or the known question is answered otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, two_columns
from machine import describe
from mixture import Doors, Seen, ask_until
from roster import HERE, ROOT
from served import Served, served, shm_files
from vitals import MB, look_at

MODEL = ROOT / "model_repository/support-int4"
DOCS, BEGIN, END = ROOT / "docs/serve.md", "<!-- soak: begin -->", "<!-- soak: end -->"
QUESTION = "Question: How many days do I have to return an item to Brindlecove?\nAnswer:"
LONGEST, LONGEST_TOGETHER = "one two three four " * 480, 2  # nearly the 2,048 tokens of the context
CLIENTS = 8
FILLERS = 8  # more than there are places for prompts to be kept
PAUSES = 6  # at least, so that a short soak has some too
PERIOD_S, SAMPLE_EVERY_S = 60.0, 5.0
GROWTH, LEAST_GROWTH_BYTES = 0.02, MB
REST_TIMEOUT_S = 30.0
POOL_THREADS = 4  # a pool starts its threads when so many things are to be done at once for the first time
WARM_REQUESTS, WARM_PERIOD_S = 250, 10.0  # by then there has been one of each kind at each door, and of each size about


async def soak(server: Served, seconds: float, seed: int, clients: int) -> dict[str, Any]:
    """Load and rest by turns; what was seen under load (`samples`), at rest (`rests`), and by the clients."""
    seen, samples, rests = Seen(), list[dict[str, Any]](), list[dict[str, Any]]()
    async with Doors(server) as doors:
        for together in (1, LONGEST_TOGETHER):
            await asyncio.gather(
                *(doors.grpc.generate(server.model, LONGEST, max_tokens=8, ignore_eos=True) for _ in range(together))
            )
    warm_s = await warm_up(server, seen, seed, clients)
    begun_s, period_s, number = time.monotonic(), min(PERIOD_S, seconds / PAUSES), 0
    while time.monotonic() - begun_s < seconds:
        end_s = begun_s + (number + 1) * period_s
        await one_period(server, seen, f"{seed}/{number}", clients, end_s, samples)
        asked = {"at_s": round(time.monotonic() - begun_s), "requests": sum(seen.counts.values())}
        rests.append(await rest(server) | asked)
        print(progress(rests[-1], seen), file=sys.stderr, flush=True)
        number += 1
    counts = dict(sorted(seen.counts.items()))
    return {"warm_s": warm_s, "rests": rests, "samples": samples, "counts": counts, "failures": seen.failures}


async def warm_up(server: Served, seen: Seen, seed: int, clients: int) -> int:
    """The same load until WARM_REQUESTS have ended, as they should or not; the seconds that it took."""
    begun_s, number = time.monotonic(), 0
    while sum(seen.counts.values()) + len(seen.failures) < WARM_REQUESTS:
        await one_period(server, seen, f"{seed}/warm/{number}", clients, time.monotonic() + WARM_PERIOD_S, [])
        number += 1
    return round(time.monotonic() - begun_s)


async def one_period(
    server: Served, seen: Seen, seed: str, clients: int, end_s: float, samples: list[dict[str, Any]]
) -> None:
    """Load until `end_s`; connections are of this period alone."""
    async with Doors(server) as doors:
        asking = [asyncio.create_task(ask_until(end_s, doors, seen, f"{seed}/{client}")) for client in range(clients)]
        while time.monotonic() < end_s:
            await asyncio.sleep(min(SAMPLE_EVERY_S, max(0.0, end_s - time.monotonic())))
            samples.append(await asyncio.to_thread(look_at, server))
        await asyncio.gather(*asking)


async def rest(server: Served) -> dict[str, Any]:
    """The server with nothing to do: its answers to the known question, and what it holds."""
    async with Doors(server) as doors:
        # The places of prompts kept for reuse hold the same ones each time.
        for number in range(FILLERS):
            filler = f"Number {number}. " + f"{number} and so on, " * 40
            await doors.grpc.generate(server.model, filler, max_tokens=1)
        answers = await doors.answers(QUESTION)
    deadline = time.monotonic() + REST_TIMEOUT_S
    while True:
        # Figures come a quarter of a second late, and connections take a moment to close.
        await asyncio.sleep(1.0)
        seen = look_at(server)
        if not seen["num_requests_running"] + seen["num_requests_waiting"] or time.monotonic() > deadline:
            return seen | {"answers": answers, "shm": shm_files(server.shm_prefix())}


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What is not as it was at the first rest; empty where all is well."""
    first, last = found["rests"][0], found["rests"][-1]
    wrong = [f"a request failed: {failure}" for failure in found["failures"][:5]]
    if len(found["rests"]) < 2:
        wrong.append("too short: there is only one rest")
    for role, before in first["processes"].items():
        after = last["processes"].get(role)
        if after is None:
            wrong.append(f"{role}: its process has gone")
            continue
        if after["pid"] != before["pid"]:
            wrong.append(f"{role}: it is another process than before")
        held, holds = before["anonymous_bytes"], after["anonymous_bytes"]
        if holds - held > max(GROWTH * held, LEAST_GROWTH_BYTES):
            wrong.append(f"{role}: memory grew by {(holds - held) / MB:.1f} MB to {holds / MB:.1f} MB")
        wrong += [
            f"{role}: {what} grew from {before[what]} to {after[what]}"
            for what, more in (("descriptors", 0), ("threads", POOL_THREADS))
            if after[what] > before[what] + more
        ]
    if (growth := memory_growth(found)) > GROWTH:
        wrong.append(f"the server: memory grew by {growth:.1%}")
    at_rest = {"num_requests_running": 0, "num_requests_waiting": 0}
    at_rest |= {what: first[what] for what in ("kv_cache_usage_perc", "shm")}
    wrong += [f"{what} should be {was} at rest, is {last[what]}" for what, was in at_rest.items() if last[what] != was]
    if not first["answers"][0]:
        wrong.append("the known question has an empty answer, which shows nothing")
    for at, answers in ((one["at_s"], one["answers"]) for one in found["rests"]):
        if set(answers) != {first["answers"][0]}:
            wrong.append(f"after {at} s the known question had another answer: {answers}")
    return wrong


def memory_growth(found: Mapping[str, Any]) -> float:
    """Of the whole server, from the first rest to the last, as a share."""
    first, last = (total_bytes(found["rests"][place]) for place in (0, -1))
    return last / first - 1


def total_bytes(seen: Mapping[str, Any]) -> float:
    return sum(float(one["anonymous_bytes"]) for one in seen["processes"].values())


def progress(rested: Mapping[str, Any], seen: Seen) -> str:
    memory = ", ".join(f"{role} {one['anonymous_bytes'] / MB:.1f}" for role, one in rested["processes"].items())
    return f"{rested['at_s']:5.0f} s  {sum(seen.counts.values())} requests, {len(seen.failures)} failed  MB: {memory}"


def markdown(report: Mapping[str, Any]) -> str:
    rests, counts = report["rests"], report["counts"]
    first, last = rests[0], rests[-1]

    def both(what: str) -> str:
        before, after = (sum(one[what] for one in seen["processes"].values()) for seen in (first, last))
        return f"{before:,.0f} → {after:,.0f}"

    rows = [
        ("requests", f"{sum(counts.values()):,}"),
        ("of these to be refused, and refused", f"{sum(n for name, n in counts.items() if 'refused' in name):,}"),
        ("given up in the middle", f"{sum(n for name, n in counts.items() if 'given up' in name):,}"),
        ("failed", f"{len(report['failures'])}"),
        ("of all these before the clock starts", f"the first {WARM_REQUESTS}, for {report['warm_s']} s"),
        (
            f"memory at rest (anonymous), after {first['at_s']} s and at the end",
            f"{total_bytes(first) / MB:,.1f} → {total_bytes(last) / MB:,.1f} MB ({report['memory_growth']:+.2%})",
        ),
        *(
            (
                f"of these {role}",
                f"{one['anonymous_bytes'] / MB:,.1f} → {last['processes'][role]['anonymous_bytes'] / MB:,.1f} MB",
            )
            for role, one in first["processes"].items()
            if role in last["processes"]
        ),
        ("most under load", f"{max(map(total_bytes, report['samples'])) / MB:,.0f} MB"),
        ("descriptors at rest", both("descriptors")),
        ("threads at rest", both("threads")),
        (
            "KV cache in use at rest (prompts kept for reuse)",
            f"{first['kv_cache_usage_perc']:.4%} → {last['kv_cache_usage_perc']:.4%}",
        ),
        ("running under load, median", f"{median(one['num_requests_running'] for one in report['samples']):.0f}"),
        ("the known answer", "the same at every rest, from all doors" if not report["wrong"] else "see soak.json"),
        ("verdict", "nothing lost" if not report["wrong"] else "; ".join(report["wrong"])),
    ]
    how = f"{report['seconds']:.0f} s with {report['clients']} clients, seed {report['seed']}"
    return two_columns(rows, report, how)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--model", type=Path, default=MODEL, help="a model's directory in a repository")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/soak.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    args = parser.parse_args(arguments)
    with served(args.model, {"threads": args.threads}) as server:
        found = asyncio.run(soak(server, args.seconds, args.seed, args.clients))
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "model": args.model.name,
        "threads": args.threads,
        "seconds": args.seconds,
        "clients": args.clients,
        "seed": args.seed,
        "memory_growth": memory_growth(found),
        "wrong": (wrong := verdict(found)),
        **found,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
