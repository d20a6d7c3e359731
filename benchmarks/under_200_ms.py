"""What "under 200 ms" comes to on this machine: a short answer to a customer, for one user and for as many as it holds.

    python benchmarks/under_200_ms.py                  # a table on stdout, benchmarks/results/under_200_ms.json
    python benchmarks/under_200_ms.py --write-docs     # the table goes into docs/loadtest.md (5 minutes)

Each precision is served by itself (`stillhouse serve`) and asked over gRPC the questions of the example that its
fine-tune has never seen. First by one user, one question after another; then `loadtest capacity --quick` looks for the
highest rate of questions at which 95 % of first tokens come within 200 ms, however many are asked at the same time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT
from served import served

from stillhouse.loadtest.capacity import QUICK, find_capacity
from stillhouse.loadtest.errors import Missed
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import run_locust

DOCS, BEGIN, END = ROOT / "docs/loadtest.md", "<!-- under 200 ms: begin -->", "<!-- under 200 ms: end -->"
QUESTIONS = ROOT / "examples/support/heldout.jsonl"
LIMIT_MS = 200
SLO = f"ttft_p95<{LIMIT_MS}ms, errors<1%"
MAX_TOKENS = 48  # answers end by themselves before that


def write_prompts(path: Path) -> Path:
    records = [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]
    prompts = [{"messages": [{"role": "user", "content": record["instruction"]}]} for record in records]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), "utf-8")
    return path


def measure(model: Path, prompts: Path, alone_s: float, probe_s: float) -> dict[str, Any]:
    """One precision's figures; `capacity_per_s` is None where not even one user gets it."""
    with served(model) as server:
        url, name = server.grpc_url, server.model
        load = Load(users=1, duration_s=3, max_tokens=MAX_TOKENS, prompts=prompts)
        run_locust(url, name, load, metrics_url=server.metrics_url)  # what a process does only once is done
        load = Load(users=1, duration_s=alone_s, max_tokens=MAX_TOKENS, prompts=prompts, seed=1)
        alone = run_locust(url, name, load, metrics_url=server.metrics_url)
        found = {
            "prompt_tokens": alone.summary.prompt_tokens_per_request,
            "answer_tokens": alone.summary.tokens_per_answer,
            "answers": alone.summary.requests,
            "ttft_ms": [alone.summary.ttft.p50_ms, alone.summary.ttft.p95_ms],
            "e2e_ms": [alone.summary.e2e.p50_ms, alone.summary.e2e.p95_ms],
            "problems": alone.problems,
            "capacity_per_s": None,
        }
        if alone.summary.ttft.p95_ms >= LIMIT_MS:
            return found  # what one user does not get, many need not be tried for
        load = Load(duration_s=probe_s, max_tokens=MAX_TOKENS, prompts=prompts, slo=SLO)
        try:
            capacity = find_capacity(
                url, name, load, start=2, effort=QUICK, metrics_url=server.metrics_url, progress=say
            )
        except Missed as missed:
            say(str(missed))
            return found
        at_the_end = capacity.repeats[-1].summary
        return found | {
            "capacity_per_s": capacity.rate,
            "goodput_per_s": capacity.goodput_per_s,
            "tokens_per_s": capacity.tokens_per_s,
            "e2e_there_ms": [at_the_end.e2e.p50_ms, at_the_end.e2e.p95_ms],
            "probes": [[probe.load.rate, probe.summary.ttft.p95_ms] for probe in capacity.probes],
        }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| precision | first token, 1 user | whole answer, 1 user | TTFT p95 < 200 ms up to | whole answer there |",
        "|---|--:|--:|--:|--:|",
    ]
    for model, found in report["models"].items():
        cells = [model.rsplit("-", 1)[-1], _pair(found["ttft_ms"]), _pair(found["e2e_ms"])]
        if found["capacity_per_s"] is None:
            cells += ["never", "–"]
        else:
            cells += [f"{found['capacity_per_s']:.1f} requests/s, {found['tokens_per_s']:.0f} tokens/s"]
            cells += [_pair(found["e2e_there_ms"])]
        lines.append(f"| {' | '.join(cells)} |")
    one, machine = next(iter(report["models"].values())), report["machine"]
    lines += [
        "",
        "Milliseconds, p50 / p95. Questions of the example's customers in its own chat template "
        f"({one['prompt_tokens']:.0f} tokens), answered in {one['answer_tokens']:.0f} tokens on average, over Triton's "
        f"gRPC; the load generator shares the machine: {machine['processor']}, {machine['cores']} cores, "
        f"{' '.join(machine.get('instruction_sets', []))}. Measured {report['measured']}.",
    ]
    return "\n".join(lines) + "\n"


def _pair(milliseconds: list[float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in milliseconds)


def say(line: str) -> None:
    print(f"  {line}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "int8", "int4"])
    parser.add_argument("--keep", action="store_true", help="what the last report has of the other precisions")
    parser.add_argument("--alone-seconds", type=float, default=15, help="how long one user asks")
    parser.add_argument("--probe-seconds", type=float, default=8, help="how long a rate is tried at least")
    parser.add_argument("--out", type=Path, default=HERE / "results/under_200_ms.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/loadtest.md")
    args = parser.parse_args()
    models = json.loads(args.out.read_text("utf-8"))["models"] if args.keep else {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(Path(folder) / "prompts.jsonl")
        for precision in args.precisions:
            say(f"{precision} …")
            model = args.repository / f"support-{precision}"
            models[model.name] = measure(model, prompts, args.alone_seconds, args.probe_seconds)
    report = {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe(),
        "slo": SLO,
        "models": models,
    }
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
