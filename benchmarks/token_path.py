"""Where the time of a token goes between the engine and the socket: py-spy on the model's process and the gateway.

    python benchmarks/token_path.py                # a table on stdout, benchmarks/results/token_path.json
    python benchmarks/token_path.py --write-docs   # the table goes into docs/serve.md

A server under a steady load (16 streams at a time) through Triton's gRPC, then through the gateway. A sampling profiler
sees which Python line each running thread is at, a hundred times a second; a sample is counted for the innermost part
that PARTS knows, and samples are turned into microseconds a token. What is no Python (Triton itself, ONNX Runtime's
other threads) is known by the CPU seconds of its process alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT
from served import Served, served
from serving_speed import Asker, cpu_s, texts
from workload import Workload

MODEL = ROOT / "model_repository/support-int4"
DOCS, BEGIN, END = ROOT / "docs/serve.md", "<!-- path: begin -->", "<!-- path: end -->"
RATE_HZ = 100
# Which process is looked at for which part of the way, and what counts for what: the frame closest to the line that
# runs decides. A pattern is looked for in "function (file:line)".
PARTS: dict[str, list[tuple[str, str]]] = {
    "model": [
        ("ONNX Runtime, as the engine's thread waits for it", r"run_with_iobinding|^(_decode|prefill) \(.*runner\.py"),
        ("detokenizing, stop strings", r"engine/(text|answer)\.py"),
        ("sampling", r"engine/(sampler|sampling)\.py"),
        ("building tensors", r"serve/(answers|tensors)\.py|__init__ \(.*pb_utils|^strings"),
        ("send()", r"^(_send|_deliver_last|deliver|_end_cancelled) \(.*answering\.py"),
        ("metrics", r"serve/metrics\.py|^_measure \("),
        ("asking whether clients have gone", r"^is_abandoned|serve/watch\.py"),
        ("handing over between threads", r"^(put|_take|_loop) \(.*answering\.py"),
        ("the door: reading requests, tokenizing", r"serve/(triton_model|answering)\.py|concurrent/futures|^execute"),
        ("scheduling", r"engine/"),
    ],
    "launcher": [
        ("metrics", r"gateway/metrics\.py|prometheus_client"),
        ("JSON and events", r"gateway/sse\.py:3\d|^event|json/encoder|gateway/(completions|chat|job|thoughts)\.py"),
        ("HTTP: uvicorn, h11, Starlette, socket", r"uvicorn|h11|starlette|fastapi|gateway/|asyncio/.*(transport|send)"),
        ("gRPC: reading messages", r"client/grpc_aio\.py|client/grpc_wire\.py|grpc/aio|cygrpc|google/protobuf"),
        ("from messages to chunks", r"client/|serve/(generating|translating)\.py|json/decoder"),
        ("event loop", r"asyncio/|selectors"),
    ],
}


def record(server: Served, roles: Sequence[str], seconds: float, folder: Path) -> dict[str, list[str]]:
    """The samples of `seconds`, as lines "frame;frame;… count", by process."""
    files = {role: folder / f"{role}.txt" for role in roles}
    options = ["--duration", f"{seconds:g}", "--rate", str(RATE_HZ), "--format", "raw", "--threads", "--full-filenames"]
    spies = [
        subprocess.Popen(
            ["py-spy", "record", "--pid", str(server.processes()[role].pid), *options, "--output", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for role, file in files.items()
    ]
    if any(spy.wait() for spy in spies):
        raise SystemExit("py-spy failed: it has to be allowed to read other processes (ptrace)")
    return {role: file.read_text("utf-8").splitlines() for role, file in files.items()}


def parts_of(role: str, lines: Sequence[str]) -> Counter[str]:
    """Samples by part."""
    rules = [(part, re.compile(pattern)) for part, pattern in PARTS[role]]
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        frames = reversed(stack.split(";"))
        part = next((part for frame in frames for part, pattern in rules if pattern.search(frame)), "other")
        found[part] += int(count)
    return found


def profile(server: Served, client: Asker, prompts: list[str], args: argparse.Namespace, way: str) -> dict[str, Any]:
    """Microseconds a token by process and part, while `client` asks `prompts`."""
    roles = ["model"] if way == "triton" else ["launcher", "model"]
    answer: dict[str, Any] = {}
    before = cpu_s(server)
    asking = threading.Thread(target=lambda: answer.update(client.ask(prompts, args.tokens, args.concurrent)))
    asking.start()
    with tempfile.TemporaryDirectory() as folder:
        recorded = record(server, roles, args.seconds, Path(folder))
    if not asking.is_alive():
        raise SystemExit(f"the load ended before the {args.seconds:g} s of the profile: raise --requests")
    asking.join()
    spent = {role: after - before[role] for role, after in cpu_s(server).items()}
    tokens = args.seconds * answer["tokens"] / answer["elapsed_s"]
    return {
        "tokens_per_s": answer["tokens"] / answer["elapsed_s"],
        "parts_us": {
            role: {part: 1e6 * count / RATE_HZ / tokens for part, count in parts_of(role, lines).most_common()}
            for role, lines in recorded.items()
        },
        "cpu_us": {role: 1e6 * seconds / answer["tokens"] for role, seconds in spent.items()},
        "client_cpu_us": 1e6 * answer["cpu_s"] / answer["tokens"],
        "stacks": recorded,
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
    if args.stacks:
        for way, of in ways.items():
            for role, lines in of["stacks"].items():
                (args.stacks / f"{way}-{role}.txt").write_text("\n".join(lines), "utf-8")
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "model": args.model.name,
        "threads": args.threads,
        "concurrent": args.concurrent,
        "ways": {way: {key: of[key] for key in of if key != "stacks"} for way, of in ways.items()},
    }


def markdown(report: Mapping[str, Any]) -> str:
    lines = ["| where | what | µs a token | of a token's time |", "|---|---|--:|--:|"]
    for role, way, title in (
        ("model", "triton", "the model's process"),
        ("launcher", "gateway", "the gateway, in the launcher"),
    ):
        of = report["ways"][way]
        for part, cost_us in of["parts_us"][role].items():
            lines.append(f"| {title} | {part} | {cost_us:,.0f} | {cost_us * of['tokens_per_s'] / 1e6:.1%} |")
            title = ""
    triton, gateway = report["ways"]["triton"], report["ways"]["gateway"]
    spent = [("Triton itself", triton["cpu_us"]["triton"]), ("the client of the gRPC streams", triton["client_cpu_us"])]
    spent += [("the client of the gateway", gateway["client_cpu_us"])]
    lines += [f"| {who} | CPU | {cost_us:,.0f} | |" for who, cost_us in spent]
    machine = report["machine"]
    lines += [
        "",
        f"{report['model']}, {report['concurrent']} streams at a time, {triton['tokens_per_s']:,.0f} tokens/s through"
        f" gRPC and {gateway['tokens_per_s']:,.0f} through the gateway while the profiler looked on. A token's time is"
        f" what passes from one token of the server to its next; the threads work at the same time, so the shares do"
        f" not add up to 100%. Machine: {machine['processor']}, {machine['cores']} cores; {report['threads']} threads"
        f" of the engine. Measured {report['measured']}.",
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
    parser.add_argument("--stacks", type=Path, help="a folder for what py-spy wrote")
    parser.add_argument("--out", type=Path, default=HERE / "results/token_path.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/serve.md")
    args = parser.parse_args()
    report = measure(args)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
