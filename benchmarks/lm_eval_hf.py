"""lm-evaluation-harness asks the gateway, and transformers itself, the same questions: what differs.

    pip install "lm-eval[api]" --target SOMEWHERE        # it is in no extra, for all that it brings
    PYTHONPATH=SOMEWHERE python benchmarks/lm_eval_hf.py # a table, benchmarks/results/lm_eval_hf.json: minutes
    PYTHONPATH=SOMEWHERE python benchmarks/lm_eval_hf.py --write-docs  # the table goes into docs/gateway.md

One side is `local-completions` at `stillhouse serve` with support-fp16, the other lm-eval's own `hf`: base and adapter
in FP32, by transformers and peft. The tasks are made here: the example's held-out questions with four answers each
(log-likelihoods), the same questions to be answered (generation), and prose (rolling log-likelihoods).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pydoc_data import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish, two_columns
from machine import describe
from roster import BASE, HERE, ROOT
from served import served

DOCS, BEGIN, END = ROOT / "docs/gateway.md", "<!-- lm-eval: begin -->", "<!-- lm-eval: end -->"
MODEL, SUPPORT = ROOT / "model_repository/support-fp16", ROOT / "examples/support"
CHOICES, TEXTS, TEXT_CHARS = 4, 12, 3000
QUESTION = "Question: {{question}}\nAnswer:"
TASKS: dict[str, dict[str, Any]] = {
    "held_out_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": QUESTION,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    },
    "held_out_answers": {
        "output_type": "generate_until",
        "doc_to_text": QUESTION,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 32},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
}

Side = dict[str, Any]  # {"results": metric by task, "said": {task: {document: what was said}}}


def write_tasks(folder: Path, seed: int) -> None:
    """The tasks as lm-eval reads them, JSON being YAML too, and their documents."""
    chance = random.Random(seed)
    records = [json.loads(line) for line in (SUPPORT / "heldout.jsonl").read_text("utf-8").splitlines()]
    questions = []
    for number, record in enumerate(records):
        others = [other["output"] for other in records if other["fact"] != record["fact"]]
        choices = chance.sample(others, CHOICES - 1)
        choices.insert(number % CHOICES, record["output"])
        questions.append({"question": record["instruction"], "choices": choices, "answer": number % CHOICES})
    prose = [{"text": topics.topics[name][:TEXT_CHARS]} for name in sorted(topics.topics)[:TEXTS]]
    for name, task in TASKS.items():
        lines = [json.dumps(document) for document in (prose if name == "prose" else questions)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
        whole = {"task": name, "test_split": "test"} | data | task
        (folder / f"{name}.yaml").write_text(json.dumps(whole), "utf-8")


def asked(folder: Path, side: str, model: str, arguments: Mapping[str, Any]) -> Side:
    """One run of lm-eval's command on the tasks in `folder`. Raises SystemExit where it fails."""
    out = folder / side
    words = ["run", "--model", model, "--include_path", str(folder), "--tasks", *TASKS, "--batch_size", "8"]
    words += ["--log_samples", "--output_path", str(out), "--model_args"]
    words += [f"{key}={value}" for key, value in arguments.items()]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: lm-eval asked {side} and failed:\n{done.stderr[-2000:]}")
    (results,) = out.rglob("results_*.json")
    said = {}
    for name in TASKS:
        (samples,) = out.rglob(f"samples_{name}_*.jsonl")
        documents = map(json.loads, samples.read_text("utf-8").splitlines())
        said[name] = {document["doc_id"]: _said(document["resps"]) for document in documents}
    return {"results": json.loads(results.read_text("utf-8"))["results"], "said": said}


def _said(responses: list[Any]) -> list[Any]:
    """A text or a log-likelihood of each request, out of lm-eval's lists of lists."""
    firsts = [one[0] for one in responses]
    return [first[0] if isinstance(first, list) else first for first in firsts]


def compare(gateway: Side, hf: Side) -> dict[str, Any]:
    """How often both chose or wrote the same, and how far their log-likelihoods are apart."""

    def pairs(task: str) -> list[tuple[list[Any], list[Any]]]:
        ours, theirs = gateway["said"][task], hf["said"][task]
        assert ours.keys() == theirs.keys()
        return [(ours[document], theirs[document]) for document in ours]

    choices = [tuple([float(value) for value in one] for one in pair) for pair in pairs("held_out_choices")]
    apart = [abs(a - b) for ours, theirs in choices for a, b in zip(ours, theirs, strict=True)]
    return {
        "questions": len(choices),
        "same_choice": sum(ours.index(max(ours)) == theirs.index(max(theirs)) for ours, theirs in choices),
        "same_answer": sum(ours == theirs for ours, theirs in pairs("held_out_answers")),
        "loglikelihood_apart_mean": statistics.mean(apart),
        "loglikelihood_apart_max": max(apart),
    }


def markdown(report: Mapping[str, Any]) -> str:
    ours, theirs, both = report["gateway"], report["hf"], report["both"]

    def figures(task: str, metric: str) -> str:
        return " and ".join(f"{side[task][f'{metric},none']:.4f}" for side in (ours, theirs))

    of = f"of {both['questions']}"
    rows = [
        ("questions with the same choice of four", f"{both['same_choice']} {of}"),
        ("questions with the same answer, letter by letter", f"{both['same_answer']} {of}"),
        ("accuracy, the gateway's and `hf`'s", figures("held_out_choices", "acc")),
        ("accuracy by length, both", figures("held_out_choices", "acc_norm")),
        ("bits per byte of prose, both", figures("prose", "bits_per_byte")),
        (
            "a log-likelihood differs by (nats of a whole answer), mean and largest",
            f"{both['loglikelihood_apart_mean']:.3f} and {both['loglikelihood_apart_max']:.3f}",
        ),
    ]
    return two_columns(rows, report, f"lm-eval {report['lm_eval']}, seed {report['seed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results/lm_eval_hf.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/gateway.md")
    options = parser.parse_args()
    try:
        lm_eval = version("lm-eval")
    except PackageNotFoundError:
        hint = "hint: pip install 'lm-eval[api]' --target FOLDER, and then PYTHONPATH=FOLDER"
        raise SystemExit(f"error: lm-eval is not there\n{hint}") from None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tasks(folder, options.seed)
        with served(MODEL) as server:
            url = f"{server.openai_url}/completions"
            gateway = asked(folder, "the gateway", "local-completions", {"model": server.model, "base_url": url})
        given = {"pretrained": BASE, "peft": SUPPORT / "adapter", "dtype": "float32", "max_length": 2048}
        hf = asked(folder, "hf", "hf", given)
    report = {
        "measured": datetime.now(timezone.utc).date().isoformat(),
        "machine": describe(),
        "threads": 2,
        "lm_eval": lm_eval,
        "seed": options.seed,
        "gateway": gateway["results"],
        "hf": hf["results"],
        "both": compare(gateway, hf),
    }
    publish(report, markdown(report), options.out, [DOCS] if options.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
