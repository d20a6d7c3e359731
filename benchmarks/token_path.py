"""Where the time of a token goes between the engine and the socket: CPU by thread, and Python's lines by py-spy.

    python benchmarks/token_path.py                # a table on stdout, benchmarks/results/token_path.json
    python benchmarks/token_path.py --write-docs   # the table goes into docs/serve.md

A server under a steady load (16 streams at a time) through Triton's gRPC, then through the gateway. The system says how
much CPU each thread of the model's process and of the gateway's took; a sampling profiler sees, some hundred times a
second, at which line the thread is that holds Python's lock. A sample counts for the innermost frame that PARTS knows;
what a thread took without the lock (in ONNX Runtime, in Triton's send(), in the kernel) is the rest of its CPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import psutil
from figures import publish
from machine import describe
from roster import HERE, ROOT
from served import Served, served
from serving_speed import Asker, cpu_s, texts
from workload import Workload

MODEL = ROOT / "model_repository/support-int4"
DOCS, BEGIN, END = ROOT / "docs/serve.md", "<!-- path: begin -->", "<!-- path: end -->"
RATE_HZ = 200
# What counts for what, by process; a pattern is looked for in "function (file:line)".
PARTS: dict[str, list[tuple[str, str]]] = {
    "model": [
        ("detokenizing, stop strings", r"engine/(text|answer)\.py"),
        ("sampling", r"engine/(sampler|sampling)\.py"),
        ("building tensors", r"serve/(answers|tensors)\.py|backend_utils\.py"),
        ("metrics", r"serve/metrics\.py|_measure \("),
        ("asking whether clients have gone", r"is_abandoned|serve/watch\.py"),
        ("send() and handing over between threads", r"serve/answering\.py"),
        ("the door: reading requests, tokenizing", r"serve/(?:triton_model|door)\.py|concurrent/futures|execute"),
        ("scheduling, binding tensors", r"engine/"),
    ],
    "launcher": [
        ("metrics", r"gateway/metrics\.py|prometheus_client"),
        ("JSON and events", r"event \(.*sse\.py|json/encoder|gateway/(completions|chat|job|thoughts|answers)\.py"),
        ("HTTP: uvicorn, h11, Starlette", r"uvicorn|h11|starlette|fastapi|gateway/"),
        ("gRPC: reading messages", r"client/grpc_(aio|wire)\.py|grpc/|cygrpc|google/protobuf"),
        ("from messages to chunks", r"client/|serve/(generating|translating)\.py|json/decoder"),
        ("looking after Triton's processes", r"serve/|psutil"),
        ("event loop", r"asyncio/|selectors"),
    ],
}
# What a thread does without Python's lock.
UNLOCKED = {
    "model": {
        "stillhouse-engine": "ONNX Runtime, the engine's thread",
        "stillhouse-send": "send(): Triton's part",
        "stillhouse-watch": "asking whether clients have gone",
        "stillhouse-metrics": "metrics",
        "": "ONNX Runtime's other threads, and Triton's in this process",
    },
    "launcher": {
        "stillhouse-gateway": "sockets and waiting for them",
        "MainThread": "looking after Triton's processes",
        "": "gRPC's own threads",
    },
}
OTHERS = "other"


@dataclass(frozen=True, slots=True)
class Recording:
    """What a process did for `seconds`: py-spy's lines "frame;frame;… count", and CPU seconds by thread's number.

    `sample_s`: what a sample stands for; the profiler looks on for a little less than all of the time.
    """

    lines: list[str]
    cpu_s: dict[int, float]
    seconds: float
    sample_s: float = 1 / RATE_HZ


def record(server: Served, roles: Sequence[str], seconds: float) -> dict[str, Recording]:
    """What the processes do in the next `seconds`."""
    options = ["--duration", f"{seconds:g}", "--rate", str(RATE_HZ), "--format", "raw", "--threads", "--gil"]
    processes = {role: server.processes()[role] for role in roles}
    with tempfile.TemporaryDirectory() as folder:
        files = {role: Path(folder) / f"{role}.txt" for role in roles}
        before, begun_s = {role: thread_cpu_s(process) for role, process in processes.items()}, time.perf_counter()
        spies = [
            subprocess.Popen(
                ["py-spy", "record", "--pid", str(process.pid), *options, "--full-filenames", "-o", str(files[role])],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for role, process in processes.items()
        ]
        if any(spy.wait() for spy in spies):
            raise SystemExit("py-spy failed: it has to be allowed to read other processes (ptrace)")
        after, window_s = (
            {role: thread_cpu_s(process) for role, process in processes.items()},
            time.perf_counter() - begun_s,
        )
        return {
            role: Recording(
                files[role].read_text("utf-8").splitlines(),
                {thread: spent - before[role].get(thread, 0.0) for thread, spent in after[role].items()},
                window_s,
                window_s / seconds / RATE_HZ,
            )
            for role in roles
        }


def thread_cpu_s(process: psutil.Process) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


def parts_of(role: str, recording: Recording) -> dict[str, float]:
    """CPU seconds by part, the largest first."""
    rules = [(part, re.compile(pattern)) for part, pattern in PARTS[role]]
    found: Counter[str] = Counter()
    unlocked_s, names = dict(recording.cpu_s), dict[int, str]()
    for line in recording.lines:
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        number, name = _THREAD.findall(thread)[0]
        part = next((part for frame in reversed(frames) for part, rule in rules if rule.search(frame)), OTHERS)
        found[part] += int(count) * recording.sample_s
        names[int(number)] = name
        unlocked_s[int(number)] = unlocked_s.get(int(number), 0.0) - int(count) * recording.sample_s
    for number, left_s in unlocked_s.items():
        # Sampling is not exact: of a thread that is nearly always in Python a little less than nothing may be left.
        found[UNLOCKED[role].get(names.get(number, ""), OTHERS)] += max(0.0, left_s)
    return dict(found.most_common())


_THREAD = re.compile(r"thread \((\d+)\): ?(.*)")


def profile(server: Served, client: Asker, prompts: list[str], args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Microseconds of CPU a token by process and part, while `client` asks `prompts`."""
    answer: dict[str, Any] = {}
    before = cpu_s(server)
    asking = threading.Thread(target=lambda: answer.update(client.ask(prompts, args.tokens, args.concurrent)))
    asking.start()
    recorded = record(server, ["model"] if way == "triton" else ["launcher", "model"], args.seconds)
    if not asking.is_alive():
        raise SystemExit(f"the load ended before the {args.seconds:g} s of the profile: raise --requests")
    asking.join()
    spent = {role: after - before[role] for role, after in cpu_s(server).items()}
    if args.stacks:
        for role, recording in recorded.items():
            (args.stacks / f"{way}-{role}.txt").write_text("\n".join(recording.lines), "utf-8")
    tokens_per_s = answer["tokens"] / answer["elapsed_s"]
    return {
        "tokens_per_s": tokens_per_s,
        "parts_us": {
            role: {
                part: 1e6 * cpu / recording.seconds / tokens_per_s for part, cpu in parts_of(role, recording).items()
            }
            for role, recording in recorded.items()
        },
        "cpu_us": {role: 1e6 * seconds / answer["tokens"] for role, seconds in spent.items()},
        "client_cpu_us": 1e6 * answer["cpu_s"] / answer["tokens"],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    version = args.model / str(args.version)
    workload = Workload.of_manual(version / "tokenizer.json", args.seed)
    ways = {}
    with served(args.model, {"threads": args.threads, "prefix_slots": 0}) as server:
        addresses = {"triton": server.grpc_url.removeprefix("grpc://"), "gateway": server.openai_url}
        for way, address in addresses.items():
            client = Asker(way, address, server.model)
            try:
                client.ask(texts(version, workload, 4, "warm", way), 16, 4)
                print(f"{way} …", file=sys.stderr)
                ways[way] = profile(server, client, texts(version, workload, args.requests, way), args, way)
            finally:
                client.close()
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "model": args.model.name,
        "threads": args.threads,
        "concurrent": args.concurrent,
        "ways": ways,
    }


def markdown(report: Mapping[str, Any]) -> str:
    triton, gateway = report["ways"]["triton"], report["ways"]["gateway"]
    through_grpc_us = triton["cpu_us"]["model"] + triton["cpu_us"]["triton"]
    rows = [("the model's process", part, cost_us) for part, cost_us in triton["parts_us"]["model"].items()]
    rows += [("Triton itself", "", triton["cpu_us"]["triton"])]
    rows += [
        ("the gateway, in the launcher", part, cost_us) for part, cost_us in gateway["parts_us"]["launcher"].items()
    ]
    lines = ["| process | what | CPU µs a token | of all without the gateway |", "|---|---|--:|--:|"]
    before = ""
    for process, part, cost_us in (row for row in rows if round(row[2])):
        share = f"{cost_us / through_grpc_us:.1%}"
        lines.append(f"| {process if process != before else ''} | {part} | {cost_us:,.0f} | {share} |")
        before = process
    machine = report["machine"]
    lines += [
        "",
        f"{report['model']}, {report['concurrent']} streams at a time: {triton['tokens_per_s']:,.0f} tokens/s through"
        f" gRPC and {gateway['tokens_per_s']:,.0f} through the gateway while the profiler looked on. The clients took"
        f" {triton['client_cpu_us']:,.0f} and {gateway['client_cpu_us']:,.0f} µs a token. Machine:"
        f" {machine['processor']}, {machine['cores']} cores; {report['threads']} threads of the engine. Measured"
        f" {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a model's directory in a repository")
    parser.add_argument("--version", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15.0, help="of profile, for each of the two ways")
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--requests", type=int, default=160, help="in all; enough to last as long as the profile")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stacks", type=Path, help="a folder for the lines that py-spy wrote")
    parser.add_argument("--out", type=Path, default=HERE / "results/token_path.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    args = parser.parse_args()
    report = measure(args)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
