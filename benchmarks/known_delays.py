"""How exact the load test's client is: fifty users at a time against a server whose delays are known.

    python benchmarks/known_delays.py                  # a table on stdout, benchmarks/results/known_delays.json
    python benchmarks/known_delays.py --write-docs     # the table goes into docs/loadtest.md

The server is the tests' own (tests/client/small_server.py): it sends an answer's first token after 200 ms and one every
20 ms from then on, and logs when each left. Client and server share this machine, and what either is late by is in the
figures. A figure is right when it is within 2 ms or 2 % of what the server logged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import LoadResult, run_locust

DOCS, BEGIN, END = ROOT / "docs/loadtest.md", "<!-- known delays: begin -->", "<!-- known delays: end -->"
FIRST_S, GAP_S, TOKENS = 0.2, 0.02, 40
WITHIN_MS, WITHIN_SHARE = 2.0, 0.02
PROTOCOLS = {"grpc": "Triton, gRPC", "http": "Triton, HTTP", "openai": "OpenAI API"}
MODEL = "support-int4"


@contextmanager
def small_server() -> Iterator[dict[str, int]]:
    """Its ports; a fresh one for each protocol, so that each has a log of its own."""
    script = ROOT / "tests/client/small_server.py"
    plan = ["--first-s", str(FIRST_S), "--gap-s", str(GAP_S), "--tokens", str(TOKENS)]
    process = subprocess.Popen([sys.executable, str(script), *plan], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        with process:
            process.kill()


def host_of(ports: dict[str, int], protocol: str) -> str:
    return f"{'' if protocol == 'grpc' else 'http://'}127.0.0.1:{ports[f'{protocol}_port']}"


def measure(protocol: str, users: int, seconds: float, processes: int) -> dict[str, Any]:
    """{"ttft", "itl"}: {"server_ms", "ours_ms"}, means over the finished answers; and how busy the client was."""
    with small_server() as ports:
        load = Load(users=users, duration_s=seconds, max_tokens=TOKENS, processes=processes)
        result = run_locust(host_of(ports, protocol), MODEL, load, metrics_url="http://127.0.0.1:1")
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['http_port']}/log", timeout=30) as response:
            log = [entry for entry in json.load(response) if entry["ended"] == "done"]
    ours = finished(result)
    client = result.details["client"]["processes"].values()
    return {
        "answers": len(ours),
        "ttft": {
            "server_ms": 1e3 * mean(entry["first_s"] for entry in log),
            "ours_ms": 1e3 * mean(one["ttft_s"] for one in ours),
        },
        "itl": {
            "server_ms": 1e3 * mean((entry["last_s"] - entry["first_s"]) / (entry["sent"] - 1) for entry in log),
            "ours_ms": 1e3 * mean((one["last_s"] - one["ttft_s"]) / (one["tokens"] - 1) for one in ours),
        },
        "tokens_per_s": result.summary.tokens_per_s,
        "loop_cpu": max(state["loop_cpu"] for state in client),
        "lag_p95_ms": max(state["lag_p95_ms"] for state in client),
        "problems": result.problems,
    }


def finished(result: LoadResult) -> list[dict[str, Any]]:
    fields = result.details["sample_fields"]
    samples = [dict(zip(fields, row, strict=True)) for row in result.details["samples"]]
    return [sample for sample in samples if sample["outcome"] == "ok"]


def is_right(figure: dict[str, float]) -> bool:
    return abs(figure["ours_ms"] - figure["server_ms"]) <= max(WITHIN_MS, WITHIN_SHARE * figure["server_ms"])


def markdown(report: dict[str, Any]) -> str:
    header = (
        "| protocol | TTFT, server | ours | off by | between tokens, server | ours | off by | client's event loop |"
    )
    lines = [header, "|---|" + "--:|" * 7]
    for protocol, found in report["protocols"].items():
        cells = []
        for name in ("ttft", "itl"):
            server_ms, ours_ms = found[name]["server_ms"], found[name]["ours_ms"]
            verdict = "" if is_right(found[name]) else " (too much)"
            cells += [f"{server_ms:.2f} ms", f"{ours_ms:.2f} ms", f"{ours_ms - server_ms:+.2f} ms{verdict}"]
        busy = f"{found['loop_cpu']:.0%} of a core, {found['tokens_per_s']:,.0f} tokens/s"
        lines.append(f"| {PROTOCOLS[protocol]} | {' | '.join(cells)} | {busy} |")
    machine = report["machine"]
    lines += [
        "",
        f"{report['users']} users at a time in {report['processes']} process(es), {report['seconds']:g} s each, "
        f"{TOKENS} tokens an answer; means. Machine: {machine['processor']}, {machine['cores']} cores. "
        f"Measured {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--processes", type=int, default=1, help="of the client")
    parser.add_argument("--protocols", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--out", type=Path, default=HERE / "results/known_delays.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/loadtest.md")
    args = parser.parse_args()
    found = {name: measure(name, args.users, args.seconds, args.processes) for name in args.protocols}
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "users": args.users,
        "seconds": args.seconds,
        "processes": args.processes,
        "protocols": found,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)
    return 0 if all(is_right(one[name]) for one in found.values() for name in ("ttft", "itl")) else 1


if __name__ == "__main__":
    sys.exit(main())
