"""The same load over the three protocols of one real server: the same tokens, and a throughput within its own spread.

    python benchmarks/protocols.py                  # a table on stdout, benchmarks/results/protocols.json: 3 minutes
    python benchmarks/protocols.py --write-docs     # the table goes into docs/loadtest.md

`stillhouse serve` on support-int4 is asked by turns over Triton's gRPC, Triton's HTTP and the OpenAI API.
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, summary
from machine import describe
from roster import HERE, ROOT
from served import Served, served

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import run_locust

DOCS, BEGIN, END = ROOT / "docs/loadtest.md", "<!-- protocols: begin -->", "<!-- protocols: end -->"
PROTOCOLS = ("Triton, gRPC", "Triton, HTTP", "OpenAI API")
FIGURES = {"tokens_per_s": "tokens/s", "ttft_p50_ms": "TTFT p50, ms", "itl_p50_ms": "between tokens p50, ms"}

Rounds = dict[str, list[dict[str, float]]]


def measure(server: Served, load: Load, rounds: int) -> Rounds:
    """What each protocol's runs gave, by turns. Raises SystemExit where a request failed."""
    urls = dict(zip(PROTOCOLS, (server.grpc_url, server.http_url, server.openai_url), strict=True))
    found: Rounds = {name: [] for name in PROTOCOLS}
    for _ in range(rounds):
        for name, url in urls.items():
            result = run_locust(url, server.model, load, metrics_url=server.metrics_url)
            said = result.summary
            if said.failures:
                raise SystemExit(f"error: {name}: {said.failures}")
            found[name].append(
                {
                    "tokens_per_s": said.tokens_per_s,
                    "ttft_p50_ms": said.ttft.p50_ms,
                    "itl_p50_ms": said.itl.p50_ms,
                    "tokens_per_answer": said.tokens_per_answer,
                }
            )
    return found


def agree(found: Rounds) -> bool:
    """Whether all answers have as many tokens, and every two ranges of tokens/s meet."""
    counts = {one["tokens_per_answer"] for runs in found.values() for one in runs}
    ranges = [summary([one["tokens_per_s"] for one in runs]) for runs in found.values()]
    return len(counts) == 1 and max(r["low"] for r in ranges) <= min(r["high"] for r in ranges)


def markdown(report: dict[str, Any]) -> str:
    lines = ["| protocol | tokens an answer | " + " | ".join(FIGURES.values()) + " |", "|---|" + "--:|" * 4]
    for name, runs in report["rounds"].items():
        cells = [f"{runs[0]['tokens_per_answer']:.0f}"]
        for key in FIGURES:
            s = summary([one[key] for one in runs])
            cells.append(f"{s['median']:.1f} ({s['low']:.1f}–{s['high']:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine, agreed = report["machine"], "within" if report["agree"] else "not within"
    lines += [
        "",
        f"{report['users']} users, {report['seconds']:g} s a run, medians of {report['count']} runs by turns "
        f"(lowest–highest): the throughputs agree {agreed} their spread. Machine: {machine['processor']}, "
        f"{machine['cores']} cores, which client and server share. Measured {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "model_repository/support-int4")
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results/protocols.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/loadtest.md")
    args = parser.parse_args()
    load = Load(users=args.users, duration_s=args.seconds, max_tokens=32, ignore_eos=True)
    with served(args.model) as server:
        found = measure(server, load, args.rounds)
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "users": args.users,
        "seconds": args.seconds,
        "count": args.rounds,
        "agree": agree(found),
        "rounds": found,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)
    return 0 if report["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
