"""The main job on a real model, end to end: build, serve, ask, run on the edge, measure.

`make demo` runs it. Every step is a command that you can type yourself; it is printed before it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "smollm2"))

from prepare import PrepareError, prepare_base  # noqa: E402

from stillhouse.client import Client, ClientError  # noqa: E402
from stillhouse.engine.errors import StillhouseError  # noqa: E402
from stillhouse.engine.policy import live_versions  # noqa: E402
from stillhouse.loadtest.compare import Compared, compare_models, comparison_table  # noqa: E402
from stillhouse.loadtest.errors import LoadtestError  # noqa: E402
from stillhouse.loadtest.load import Load  # noqa: E402
from stillhouse.serve.launcher import Server, running_server  # noqa: E402

SUPPORT = ROOT / "examples" / "support"
REPOSITORY = ROOT / "model_repository"
OUT = ROOT / "demo-out"
PRECISIONS = ("fp16", "int8", "int4")
MODELS = [f"support-{precision}" for precision in PRECISIONS]
MAX_TOKENS = 64
LOAD_S = 15.0


def main() -> int:
    began_s = time.monotonic()
    questions = json.loads((SUPPORT / "questions.json").read_text("utf-8"))
    question: str = questions["demo"]
    OUT.mkdir(exist_ok=True)

    with step("The base: the real SmolLM2-135M-Instruct as a checkpoint"):
        base = prepare_base()
        before = answer_of_base(base, question)
        print(f"  {base.relative_to(ROOT)}")

    with step("The build: merge, export, quantize, prove, publish"):
        stillhouse("build", "examples/support/recipe.toml")

    with step("The cloud: a real Triton server on model_repository/"), running_server(REPOSITORY) as server:
        print(f"  {server.grpc_url}  {server.http_url}  {server.metrics_url}\n")
        print(f"  {question}\n")
        print(f"  {'base, before the fine-tune':<28} {before}")
        answers = ask_everywhere(server, question)

        with step("The edge: the same support-int4 version, without Triton, torch or transformers"):
            answers["edge"] = ask_edge(question)
            print(f"  {'support-int4 on the edge':<28} {answers['edge']}")

        with step(f"The load test: Locust, 4 users, {LOAD_S:g} s a precision"):
            compared = compare_models(
                server.grpc_url,
                MODELS,
                Load(users=4, duration_s=LOAD_S, max_tokens=MAX_TOKENS),
                metrics_url=server.metrics_url,
                repository=REPOSITORY,
                progress=lambda line: print(f"  {line}", file=sys.stderr),
            )
            print(comparison_table(compared))

    save(question, before, answers, compared)
    wrong = [where for where, answer in answers.items() if not has_all(answer, questions["demo_expect"])]
    print(SUMMARY.format(question=question, took_s=time.monotonic() - began_s))
    if wrong:
        expected = " and ".join(questions["demo_expect"])
        raise StillhouseError(
            f"the answer of {', '.join(wrong)} lacks {expected!r}",
            hint="the figures above say how much of the fine-tune is left in each precision",
        )
    return 0


SUMMARY = """
Done in {took_s:.0f} s. Everything that was started is stopped.
  model_repository/          the versions: what Triton and the edge runner load
  demo-out/results.json      the answers and the figures above

Next:
  make serve
  .venv/bin/stillhouse chat grpc://localhost:8001 support-int4
  curl -s localhost:8000/v2/models/support-int4/generate -d '{{
    "messages": "[{{\\"role\\": \\"user\\", \\"content\\": \\"{question}\\"}}]",
    "sampling_parameters": "{{\\"max_tokens\\": 64, \\"temperature\\": 0}}"}}'
  make test"""


@contextmanager
def step(title: str) -> Iterator[None]:
    """Prints the title before, and the time after."""
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}", flush=True)
    began_s = time.monotonic()
    yield
    print(f"  ({time.monotonic() - began_s:.0f} s)", flush=True)


def stillhouse(*arguments: str) -> None:
    """Runs the command as a person would; its output goes to the terminal."""
    print(f"  $ stillhouse {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "stillhouse.cli.main", *arguments], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def answer_of_base(base: Path, question: str) -> str:
    """What the base says before the fine-tune, by transformers, in a process of its own; kept for the next demo."""
    kept = OUT / "base_answer.json"
    key = {"question": question, "base": (base / "prepared.json").read_text("utf-8")}
    if kept.is_file():
        record = json.loads(kept.read_text("utf-8"))
        if record["key"] == key:
            return str(record["answer"])
    asked = [sys.executable, "-c", BASE_ANSWERS, str(base), question, str(MAX_TOKENS)]
    answer = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True, env=quiet()).stdout.strip()
    kept.write_text(json.dumps({"key": key, "answer": answer}, indent=2), "utf-8")
    return answer


BASE_ANSWERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question, most = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
asked = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
told = model.generate(**asked, max_new_tokens=int(most), do_sample=False)
print(tokenizer.decode(told[0, asked["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def ask_everywhere(server: Server, question: str) -> dict[str, str]:
    """The answers of every precision: over gRPC as a stream, and over HTTP, which must agree."""
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": MAX_TOKENS, "temperature": 0.0}
    answers: dict[str, str] = {}
    with Client(server.grpc_url) as grpc, Client(server.http_url) as http:
        for model in MODELS:
            print(f"  {model + ' over gRPC, streamed':<28} ", end="", flush=True)
            pieces = []
            for token in grpc.stream(model, **asked):
                pieces.append(token.text)
                print(token.text, end="", flush=True)
            answers[f"{model} over gRPC"] = "".join(pieces)
            answers[f"{model} over HTTP"] = http.generate(model, **asked).text
            print(f"\n  {model + ' over HTTP':<28} {answers[f'{model} over HTTP']}")
    return answers


def ask_edge(question: str) -> str:
    """The edge runner's answer, from a process in which torch, transformers and tritonclient cannot be imported."""
    directory = REPOSITORY / "support-int4" / str(live_versions(REPOSITORY / "support-int4")[-1])
    print(f"  $ stillhouse edge generate {directory.relative_to(ROOT)} --prompt …", flush=True)
    arguments = ["edge", "generate", str(directory), "--prompt", question, "--max-tokens", str(MAX_TOKENS)]
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'tritonclient', 'pytriton')))\n"
        "from stillhouse.cli.main import run\n"
        f"sys.exit(run({arguments!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def has_all(answer: str, expected: list[str]) -> bool:
    return all(part in answer for part in expected)


def quiet() -> dict[str, str]:
    return {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def save(question: str, before: str, answers: dict[str, str], compared: list[Compared]) -> None:
    found = {
        "question": question,
        "base": before,
        "answers": answers,
        "load": [one.to_json() for one in compared],
    }
    (OUT / "results.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (StillhouseError, ClientError, LoadtestError, PrepareError) as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
