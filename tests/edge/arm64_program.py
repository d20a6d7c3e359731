"""Runs on both machines, in an interpreter of its own: logits of a text and a greedy answer, as JSON and .npy.

python arm64_program.py VERSION OUT.npy TOKEN,TOKEN,… COUNT
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np

from stillhouse.engine import session
from stillhouse.engine.directory import open_version
from stillhouse.engine.runner import OrtRunner


def main() -> None:
    directory, out, prompt, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    tokens = [int(token) for token in prompt.split(",")]
    # Without Arm's own kernels both machines compute by the same algorithm; an emulated core must not spin.
    settings = {"mlas.disable_kleidiai": "1", "session.intra_op.allow_spinning": "0"}
    session._sharing_the_cpu = lambda: settings
    version = open_version(directory)
    network = version.manifest.network
    runner = OrtRunner(
        version.model_path, network=network, slots=1, max_len=len(tokens) + count, threads=1, provider="cpu"
    )
    logits = runner.prefill(0, tokens, 0).copy()
    answer = [int(logits[-1].argmax())]
    while len(answer) < count:
        past = len(tokens) + len(answer) - 1
        answer.append(int(runner.decode(answer[-1:], [past])[0].argmax()))
    np.save(out, logits)
    print(json.dumps({"machine": platform.machine(), "answer": answer}))


if __name__ == "__main__":
    main()
