"""aarch64 really runs, without a board: the same versions, their logits within a tolerance, the same greedy answers.

`make arm64` lays the emulated machine out (deploy/arm64.sh) and runs this.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stillhouse.engine.text import Tokenizer

# The example may have to be built first.
pytestmark = [pytest.mark.aarch64, pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / ".arm64"
PROGRAM = Path(__file__).with_name("arm64_program.py")
ROOMS = [str(ROOT / room) for room in ("engine", "gateway", "edge", "cli")]
QUESTION = [{"role": "user", "content": "May I return the boots?"}]
REAL_TOLERANCE = 2.0  # logits
# What the tiny model's logits may differ by, as a share of their own spread: on average, and at the most.
TOLERANCE = {"fp16": (0.02, 0.2), "int8": (0.02, 0.2), "int4": (0.02, 0.2)}


@dataclass(frozen=True)
class Said:
    """What a machine made of a version: logits (tokens, vocab_size) of a text and of its greedy answer behind it."""

    logits: NDArray[np.float32]
    answer: list[int]

    def margins(self) -> list[float]:
        """By how much each token of the answer was likelier than the one that is second."""
        best = np.sort(self.logits[-len(self.answer) :], axis=1)
        return [float(margin) for margin in best[:, -1] - best[:, -2]]


@pytest.fixture(scope="module")
def reciting(
    emulated: list[str], tiny_base: Path, kept_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """A tiny model that has learnt 64 tokens by heart, in all precisions, and these tokens.

    It is sure of what comes next, so that no rounding changes it: where an answer is another, a kernel is wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from stillhouse.build import pipeline, texts
    from stillhouse.build.recipe import load_recipe

    assert emulated and kept_cache
    folder = tmp_path_factory.mktemp("reciting")
    shutil.copytree(tiny_base, folder / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokens = torch.randperm(1000)[:64] + 10
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(input_ids=tokens[None], labels=tokens[None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    model.save_pretrained(folder / "base")
    # Nor does it know anything else: no gate is of use here.
    (folder / "recipe.toml").write_text(
        'name = "tiny"\nbase = "base"\nadapters = []\nprecisions = ["fp16", "int8", "int4"]\n'
        '[quantize.int4]\nmethod = "k_quant"\n'
        + "".join(f"[gate.{precision}]\nperplexity_ratio = 100\n" for precision in TOLERANCE),
        "utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LEAST_TOKENS", 1_000)
        results = pipeline.build(load_recipe(folder / "recipe.toml"), folder / "repository").results
    assert [result.status for result in results] == ["published"] * 3, results
    return folder / "repository", tokens.tolist()


def ask(
    python: list[str], versions: list[Path], tokens: list[int], count: int, folder: Path, **variables: str
) -> tuple[str, dict[str, Said]]:
    """The machine of an interpreter, and what each model said there."""
    folder.mkdir()
    command = [*python, str(PROGRAM), str(folder), ",".join(map(str, tokens)), str(count), *map(str, versions)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return said["machine"], {
        model: Said(np.load(folder / f"{model}.npy"), answer) for model, answer in said["answers"].items()
    }


def ask_both(
    emulated: list[str], versions: list[Path], tokens: list[int], count: int, folder: Path
) -> dict[str, tuple[Said, Said]]:
    """What each model says here, and on aarch64."""
    machine, here = ask([sys.executable], versions, tokens, count, folder / "here")
    other, there = ask(emulated, versions, tokens, count, folder / "there", **emulation())
    assert other == "aarch64" != machine
    return {model: (here[model], there[model]) for model in here}


def emulation() -> dict[str, str]:
    return {
        "QEMU_CPU": "cortex-a76",
        "PYTHONHOME": str(PLACE / "sysroot/usr"),
        "PYTHONPATH": os.pathsep.join([*ROOMS, str(PLACE / "site")]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def test_teacher_forced_logits_and_greedy_tokens_are_the_same_in_every_precision(
    emulated: list[str], reciting: tuple[Path, list[int]], tmp_path: Path
) -> None:
    """A text is forced on both machines: its logits may differ by the tolerance; then both go on by themselves."""
    repository, text = reciting
    versions = [repository / f"tiny-{precision}" / "1" for precision in TOLERANCE]
    said = ask_both(emulated, versions, text[:24], 32, tmp_path)
    for precision, (mean, largest) in TOLERANCE.items():
        here, there = said[f"tiny-{precision}"]
        assert there.answer == here.answer == text[24:56], precision
        assert (here.logits.argmax(axis=1) == there.logits.argmax(axis=1)).all(), precision
        differences, spread = np.abs(here.logits - there.logits), float(here.logits.std())
        assert differences.mean() < mean * spread, precision
        assert differences.max() < largest * spread, precision


def test_the_real_models_four_bits_differ_by_what_the_processors_kernels_do(
    emulated: list[str], support_repository: Path, tmp_path: Path
) -> None:
    """Each processor's kernels round activations to 8 bits in another order; measured against AVX2: 0.26 on average."""
    version = support_repository / "support-int4" / "1"
    tokenizer = Tokenizer(version)
    tokens = tokenizer.encode(tokenizer.render_chat(QUESTION), add_special_tokens=False)
    here, there = ask_both(emulated, [version], tokens, 16, tmp_path)["support-int4"]
    forced, also = here.logits[: len(tokens)], there.logits[: len(tokens)]
    assert np.abs(forced - also).mean() < REAL_TOLERANCE / 4
    assert (forced.argmax(axis=1) == also.argmax(axis=1)).mean() > 0.75
    # The same tokens; they may part only where the two likeliest lie closer than the kernels differ.
    parts = next((at for at, pair in enumerate(zip(here.answer, there.answer, strict=True)) if len({*pair}) > 1), None)
    assert parts is None or (parts >= 4 and here.margins()[parts] < REAL_TOLERANCE), (here.answer, there.answer)


def test_edge_generate_answers_on_aarch64(emulated: list[str], support_repository: Path, tmp_path: Path) -> None:
    version = str(support_repository / "support-int4" / "1")
    # What the fine-tune was taught is what four bits are sure of, on whichever kernels.
    prompt = "How many days do I have to return an item to Brindlecove?"
    command = ["-m", "stillhouse.cli.main", "edge", "generate", version, "--prompt", prompt]
    variables = emulation() | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [*emulated, *command, "--max-tokens", "16", "--threads", "1"], capture_output=True, text=True,
        env=os.environ | variables, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "47 days" in done.stdout
