"""Where a step's time goes: ONNX Runtime's own profile of the engine's graph, by operator and output width.

    python benchmarks/operators.py                # a table on stdout, benchmarks/results/operators.json
    python benchmarks/operators.py --write-docs   # the table goes into docs/benchmarks.md

Each of decode with 1 and with 16 sequences and prefill of 256 tokens is run for some seconds on a session of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnxruntime as ort
from figures import publish
from machine import describe
from roster import HERE, ROOT
from workload import Workload

from stillhouse.engine.directory import open_version
from stillhouse.engine.runner import OrtRunner
from stillhouse.engine.session import model_to_load

VERSION = ROOT / "model_repository/support-int4/1"
DOCS, BEGIN, END = ROOT / "docs/benchmarks.md", "<!-- operators: begin -->", "<!-- operators: end -->"
PAST_TOKENS, PREFILL_TOKENS = 96, 256
LEAST_SHARE = 0.02  # what is smaller is summed up


def profiled(version: Path, threads: int, prepare: Callable[[OrtRunner], Callable[[int], object]], for_s: float) -> Any:
    """Runs what `prepare` returns again and again; {operator: ms a run}, the heaviest first."""
    opened, options = open_version(version, verify=False), ort.SessionOptions

    def profiling() -> ort.SessionOptions:
        with_profile = options()
        with_profile.enable_profiling = True
        with_profile.profile_file_prefix = str(Path(scratch) / "profile")
        return with_profile

    with tempfile.TemporaryDirectory() as scratch:
        model = model_to_load(opened, "cpu")
        ort.SessionOptions = profiling
        try:
            network = opened.manifest.network
            runner = OrtRunner(model, network=network, slots=16, max_len=1024, threads=threads)
        finally:
            ort.SessionOptions = options
        run = prepare(runner)
        run(0)
        runs, until_s = 0, time.perf_counter() + for_s
        while time.perf_counter() < until_s:
            run(runs % 64)
            runs += 1
        events = json.loads(Path(runner._session.end_profiling()).read_text("utf-8"))
    began_us = [event for event in events if event["name"] == "model_run"][-runs]["ts"]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= began_us:
            spent[_name(event["args"])] += event["dur"]
    return {name: total / runs / 1e3 for name, total in spent.most_common()}


def _name(args: dict[str, Any]) -> str:
    """The operator; of a matrix product also how wide its output is, which tells the projections apart."""
    if args["op_name"] != "MatMulNBits":
        return str(args["op_name"])
    (shape,) = args["output_type_shape"][0].values()
    return f"MatMulNBits, {shape[-1]} wide"


def measure(version: Path, threads: int, seed: int, for_s: float) -> dict[str, dict[str, float]]:
    workload = Workload.of_manual(version / "tokenizer.json", seed)

    def decode(rows: int) -> Callable[[OrtRunner], Callable[[int], object]]:
        def prepare(runner: OrtRunner) -> Callable[[int], object]:
            for slot in range(rows):
                runner.prefill(slot, workload.prompt(PAST_TOKENS, slot), 0, last_only=True)
            return lambda number: runner.decode([1] * rows, [PAST_TOKENS + number] * rows)

        return prepare

    def prefill(runner: OrtRunner) -> Callable[[int], object]:
        return lambda number: runner.prefill(0, workload.prompt(PREFILL_TOKENS, number), 0, last_only=True)

    cases = {"decode, 1 sequence": decode(1), "decode, 16": decode(16), f"prefill, {PREFILL_TOKENS} tokens": prefill}
    return {name: profiled(version, threads, prepare, for_s) for name, prepare in cases.items()}


def markdown(report: dict[str, Any]) -> str:
    profile, machine = report["profile"], report["machine"]
    totals = {case: sum(spent.values()) for case, spent in profile.items()}
    operators = [
        name
        for name in dict.fromkeys(name for spent in profile.values() for name in spent)
        if any(spent.get(name, 0.0) >= LEAST_SHARE * totals[case] for case, spent in profile.items())
    ]
    lines = [f"| | {' | '.join(profile)} |", "|---|" + "--:|" * len(profile)]
    for name in operators:
        shares = (f"{spent.get(name, 0.0) / totals[case]:.1%}" for case, spent in profile.items())
        lines.append(f"| {name} | {' | '.join(shares)} |")
    rest = (1 - sum(spent.get(name, 0.0) for name in operators) / totals[case] for case, spent in profile.items())
    lines.append(f"| the rest | {' | '.join(f'{share:.1%}' for share in rest)} |")
    lines.append(f"| **all, ms** | {' | '.join(f'{total:.1f}' for total in totals.values())} |")
    lines += ["", f"Machine: {machine['processor']}, {machine['cores']} cores; {report['threads']} threads."]
    lines[-1] += f" Measured {report['measured']}."
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version-dir", type=Path, default=VERSION)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0, help="a case")
    parser.add_argument("--out", type=Path, default=HERE / "results/operators.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "threads": args.threads,
        "profile": measure(args.version_dir, args.threads, args.seed, args.seconds),
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
