"""Runs on both machines, in an interpreter of its own: logits of a text and a greedy answer of each version.

python arm64_program.py FOLDER TOKEN,TOKEN,… COUNT VERSION…

Writes FOLDER/MODEL.npy, the logits (tokens + COUNT − 1, vocab_size) of the text and then of the answer, a token a step,
and prints {"machine", "answers": {MODEL: token ids}}.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine import session
from stillhouse.engine.directory import open_version
from stillhouse.engine.runner import OrtRunner


def main() -> None:
    folder, prompt, count, directories = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
    # Without Arm's own kernels both machines compute by the same algorithm; an emulated core must not spin.
    settings = {"mlas.disable_kleidiai": "1", "session.intra_op.allow_spinning": "0"}
    session._sharing_the_cpu = lambda: settings
    tokens = [int(token) for token in prompt.split(",")]
    answers = {}
    for directory in directories:
        model, logits, answers[model] = ask(Path(directory), tokens, count)
        np.save(folder / f"{model}.npy", logits)
    print(json.dumps({"machine": platform.machine(), "answers": answers}))


def ask(directory: Path, tokens: list[int], count: int) -> tuple[str, NDArray[Any], list[int]]:
    """The model's name, its logits for `tokens` and for what it goes on with, and these `count` tokens."""
    version = open_version(directory)
    runner = OrtRunner(
        version.model_path,
        network=version.manifest.network,
        slots=1,
        max_len=len(tokens) + count,
        threads=1,
        provider="cpu",
    )
    logits = list(runner.prefill(0, tokens, 0))
    answer = [int(logits[-1].argmax())]
    while len(answer) < count:
        past = len(tokens) + len(answer) - 1
        logits.append(runner.decode(answer[-1:], [past])[0].copy())
        answer.append(int(logits[-1].argmax()))
    return version.manifest.model, np.stack(logits), answer


if __name__ == "__main__":
    main()
