"""Our load test beside a public load generator: NVIDIA's aiperf, on the same servers, in turns.

    python benchmarks/generators.py --setup            # aiperf's environment, once (700 MB)
    python benchmarks/generators.py                    # a table on stdout, benchmarks/results/generators.json
    python benchmarks/generators.py --write-docs       # the table goes into docs/loadtest.md

Both ask over the OpenAI API: as many users at a time, the same made-up prompts, answers of the same fixed length,
greedily. They take turns (A B A B …), each for the same time. Both calculate the time between tokens as
(end to end - time to first token) / (tokens - 1), and count tokens as the server does.

Two servers are asked: `stillhouse serve`, which has half of the processors to itself, and the generators the others
(aiperf is nine processes, which would take them from the server); and the tests' server of known delays, which needs
next to none. The first is asked by one user: how the requests of several meet in the server's batch is each generator's
own, and the server's times for them with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from known_delays import MODEL as SMALL_MODEL
from known_delays import host_of, small_server
from machine import describe
from roster import ENVIRONMENTS, HERE, ROOT, PeerError, PeerSpec, set_up
from served import served

from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import run_locust
from stillhouse.loadtest.synthetic import parse_synthetic

DOCS, BEGIN, END = ROOT / "docs/loadtest.md", "<!-- generators: begin -->", "<!-- generators: end -->"
AIPERF = PeerSpec("aiperf", "", "aiperf")
PROMPTS, PROMPT_LENGTHS = 400, "input=uniform(24, 48)"
WARM_UP_S = 3.0
FIGURES = {
    "ttft_p50_ms": ("time to first token, p50", " ms"),
    "ttft_p95_ms": ("the same, p95", " ms"),
    "itl_p50_ms": ("between tokens, p50", " ms"),
    "itl_p95_ms": ("the same, p95", " ms"),
    "tokens_per_s": ("tokens/s", ""),
}


@dataclass(frozen=True)
class Asked:
    """A server, as a generator needs it."""

    openai_url: str
    model: str
    metrics_url: str
    users: int


def ours(server: Asked, prompts: Path, args: argparse.Namespace, seconds: float) -> dict[str, float]:
    load = Load(
        users=server.users,
        duration_s=seconds,
        max_tokens=args.tokens,
        ignore_eos=True,
        prompts=prompts,
        protocol="openai",
    )
    result = run_locust(server.openai_url, server.model, load, metrics_url=server.metrics_url)
    if result.problems:
        print(f"  ours: {result.problems[0]}", file=sys.stderr)
    s = result.summary
    return {
        "ttft_p50_ms": s.ttft.p50_ms,
        "ttft_p95_ms": s.ttft.p95_ms,
        "itl_p50_ms": s.itl.p50_ms,
        "itl_p95_ms": s.itl.p95_ms,
        "tokens_per_s": s.tokens_per_s,
        "answers": s.requests,
    }


def aiperf(server: Asked, prompts: Path, args: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Its own export of the same figures. Raises PeerError with the end of its log."""
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        asked = [json.loads(line)["messages"][0]["content"] for line in prompts.read_text("utf-8").splitlines()]
        questions.write_text("".join(json.dumps({"text": text}) + "\n" for text in asked), "utf-8")
        command = [ENVIRONMENTS / "aiperf/bin/aiperf", "profile", "-m", server.model, "--endpoint-type", "chat"]
        command += ["--url", server.openai_url.removesuffix("/v1"), "--streaming", "--use-server-token-count"]
        command += ["--input-file", questions, "--custom-dataset-type", "single_turn"]
        command += ["--concurrency", server.users, "--benchmark-duration", seconds, "--workers-max", 1]
        inputs = {"max_tokens": args.tokens, "ignore_eos": True, "temperature": 0}
        for name, value in inputs.items():
            command += ["--extra-inputs", f"{name}:{json.dumps(value)}"]
        command += ["--tokenizer", args.model.resolve() / "1", "--no-gpu-telemetry", "--no-server-metrics"]
        command += ["--ui", "none", "--output-artifact-dir", folder]
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            timeout=seconds + 180,
            cwd=folder,
        )
        found = sorted(Path(folder).rglob("profile_export_aiperf.json"))
        if not found:
            raise PeerError(f"aiperf gave no figures: {(done.stdout + done.stderr)[-2000:]}")
        value = json.loads(found[0].read_text("utf-8"))
    return {
        "ttft_p50_ms": value["time_to_first_token"]["p50"],
        "ttft_p95_ms": value["time_to_first_token"]["p95"],
        "itl_p50_ms": value["inter_token_latency"]["p50"],
        "itl_p95_ms": value["inter_token_latency"]["p95"],
        "tokens_per_s": value["output_token_throughput"]["avg"],
        "answers": value["request_count"]["avg"],
    }


GENERATORS: dict[str, Callable[..., dict[str, float]]] = {"stillhouse": ours, "aiperf": aiperf}


@contextmanager
def real(args: argparse.Namespace) -> Iterator[Asked]:
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    try:
        os.sched_setaffinity(0, cores[:half] or cores)  # a process that starts now inherits it
        with served(args.model, {"threads": max(1, half)}) as server:
            os.sched_setaffinity(0, cores[half:])
            yield Asked(server.openai_url, server.model, server.metrics_url, users=1)
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def small(args: argparse.Namespace) -> Iterator[Asked]:  # noqa: ARG001
    with small_server() as ports:
        yield Asked(f"{host_of(ports, 'openai')}/v1", SMALL_MODEL, "http://127.0.0.1:1", users=4)


SERVERS = {"stillhouse serve": real, "known delays": small}


def measure(args: argparse.Namespace, asked: Callable[..., Any]) -> dict[str, list[dict[str, float]]]:
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in GENERATORS}
    synthetic = parse_synthetic(PROMPT_LENGTHS)
    assert synthetic is not None
    with tempfile.TemporaryDirectory() as folder, asked(args) as server:
        prompts = Path(folder) / "prompts.jsonl"
        made = synthetic.prompts(PROMPTS, args.seed)
        prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in made), "utf-8")
        ours(server, prompts, args, WARM_UP_S)
        for number in range(args.rounds):
            for name, drive in GENERATORS.items():
                print(f"  round {number + 1} of {args.rounds}: {name} …", file=sys.stderr)
                rounds[name].append(drive(server, prompts, args, args.seconds))
    return rounds


def markdown(report: dict[str, Any]) -> str:
    lines = ["| server | | stillhouse loadtest | aiperf | ratio |", "|---|---|--:|--:|--:|"]
    for server, rounds in report["servers"].items():
        for key, (title, unit) in FIGURES.items():
            mine, theirs = ([one[key] for one in rounds[name]] for name in GENERATORS)
            ratio = median(a / b for a, b in zip(mine, theirs, strict=True))
            cells = [f"{median(of):,.1f}{unit} ({min(of):,.1f}–{max(of):,.1f})" for of in (mine, theirs)]
            lines.append(f"| {server} | {title} | {' | '.join(cells)} | {ratio:.2f} |")
    machine = report["machine"]
    lines += [
        "",
        f"Medians of {report['seconds']:g} s a round (lowest–highest); the ratio is the median of the "
        f"{len(mine)} rounds'. One user of `stillhouse serve`, four of the known delays; "
        f"answers of {report['tokens']} tokens, {report['model']}; "
        f"machine: {machine['processor']}, {machine['cores']} cores, half of them for `stillhouse serve` alone. "
        f"Measured {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="make aiperf's environment, and end")
    parser.add_argument("--model", type=Path, default=ROOT / "model_repository/support-int4")
    parser.add_argument("--servers", nargs="+", choices=list(SERVERS), default=list(SERVERS))
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=Path, default=HERE / "results/generators.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/loadtest.md")
    args = parser.parse_args()
    if args.setup:
        set_up(AIPERF, compile_native=False)
        return 0
    if why := AIPERF.why_not(args.model):
        print(f"error: {why.replace('--setup aiperf', '--setup')}", file=sys.stderr)
        return 1
    try:
        found = {name: measure(args, SERVERS[name]) for name in args.servers}
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    about = {"tokens": args.tokens, "seconds": args.seconds, "model": args.model.name}
    about |= {"measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "machine": describe()}
    report = about | {"servers": found}
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
