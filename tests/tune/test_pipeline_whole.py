"""The whole pipeline on a tiny model: from a CSV to a version, killed on the way, done once, stopped by its gate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.directory import open_version
from stillhouse.tune.finetune import tune
from stillhouse.tune.settings import load_tune_recipe

pytestmark = pytest.mark.slow

STAGES = ("data", "tune", "evaluate", "build", "precisions")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")
ASKS = (
    "What is",
    "Which number is",
    "Tell me the value of",
    "How much is",
    "Translate",
    "Count",
    "Say",
    "Name",
    "Write",
)
RECIPE = """
precisions = ["fp16"]

[data]
[data.duplicates]
near = 1
group = 0.99
[[data.sources]]
path = "raw.csv"
columns = { instruction = "Frage", output = "Antwort" }

[tune]
epochs = 4
batch_size = 4
learning_rate = 5e-3
r = 4
alpha = 8
save_every_steps = 5
device = "cpu"

[evaluate]
better = ["records_perplexity"]
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path) -> Path:
    rows = [f"{ask} {word}?;The number {at} is what {word} means." for ask in ASKS for at, word in enumerate(WORDS)]
    (tmp_path / "raw.csv").write_text("\n".join(["Frage;Antwort", *rows]) + "\n", "utf-8")
    file = tmp_path / "recipe.toml"
    file.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n{RECIPE}', "utf-8")
    return file


def command(recipe: Path) -> list[str]:
    home = recipe.parent
    asked = ["pipeline", str(recipe), "--output", str(home / "runs"), "--repository", str(home / "repository")]
    return [sys.executable, "-m", "stillhouse.cli.main", *asked, "--json"]


def test_from_a_csv_to_a_version_in_one_command(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def pipeline() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(recipe), env=environment, capture_output=True, text=True, timeout=600)

    def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
        assert done.returncode == 0, done.stderr
        return {outcome["stage"]: outcome["status"] for outcome in json.loads(done.stdout)}

    killed = subprocess.Popen(command(recipe), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(run.glob("tune-*/adapter-runs/*/checkpoint-5/whole")) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert statuses(pipeline()) == {"data": "unchanged"} | dict.fromkeys(STAGES[1:], "done")
    (log,) = run.glob("tune-*/stderr.txt")
    assert "going on from step" in log.read_text("utf-8")

    (adapter,) = run.glob("tune-*/adapter")
    (dataset,) = run.glob("data-*/tiny/1")
    assert weights(adapter) == pytest.approx(uninterrupted(recipe, dataset), abs=1e-6)
    version = open_version(tmp_path / "repository" / "tiny-fp16" / "1").manifest
    assert version.quality is not None and version.quality.passed and len(version.adapters) == 1
    page = (run / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 4  # loss, what changed, size and quality, what changed by precision
    assert page.count("data:image/svg+xml;base64,") == 3  # of the data: lengths, steps, topics; it has no classes
    words = re.sub(r'base64,[^"]*', "", page)
    assert "<h2>build: " in words and "tiny-fp16" in words and "http" not in words
    assert "<th>base</th><th>tuned</th><th>tiny-fp16 v1</th>" in words  # before, after, and every precision
    (log,) = run.glob("precisions-*/stderr.txt")
    said = log.read_text("utf-8")
    assert "measured before: base" in said and "measured before: tuned" in said and "measuring: tiny-fp16 v1" in said

    assert set(statuses(pipeline()).values()) == {"unchanged"}
    assert [folder.name for folder in (tmp_path / "repository" / "tiny-fp16").glob("[0-9]*")] == ["1"]

    # Asked as in the training, and answered with what no answer of it has: what was learnt is surely no help.
    odd = [
        {"instruction": f"Explain {word}?", "output": sign}
        for word, sign in zip(WORDS, "龘靐齉麤黸爨灪麷鸞籲驫鱻", strict=True)
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd), "utf-8")
    recipe.write_text(recipe.read_text("utf-8") + 'records = "odd.jsonl"\n', "utf-8")
    stopped = pipeline()
    assert stopped.returncode == 1
    error, hint = stopped.stderr.splitlines()[-2:]
    assert error.startswith("error: evaluate: the fine-tune does not hold its gate: perplexity, held-out answers: ×")
    assert hint.startswith("hint: ")
    last = {each["stage"]: each["status"] for each in json.loads((run / "stages.json").read_text("utf-8"))["last_run"]}
    # What is measured on must not be trained on: the data are held against it, and come out as they were.
    not_run = {"build": "not run", "precisions": "not run"}
    assert last == {"data": "done", "tune": "unchanged", "evaluate": "failed"} | not_run
    assert "does not hold its gate" in (run / "report.html").read_text("utf-8")


def weights(adapter: Path) -> list[float]:
    from safetensors.numpy import load_file

    found: dict[str, Any] = load_file(adapter / "adapter_model.safetensors")
    return [float(value) for name in sorted(found) for value in found[name].ravel()]


def uninterrupted(recipe: Path, dataset: Path) -> list[float]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    changes = [f"tune.data={dataset}", f"tune.output={recipe.parent / 'other'}"]
    done = tune(load_tune_recipe(recipe, changes))
    torch.set_num_threads(threads)
    assert done is not None
    return weights(done[0])
