"""What a build needs, reckoned before it begins: memory and disk, in bytes.

The terms are what a stage holds at its peak; the figures measured against them are in docs/build.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillhouse.build.texts import LEAST_TOKENS, WINDOW_TOKENS

if TYPE_CHECKING:
    from stillhouse.build.checkpoint import Checkpoint
    from stillhouse.build.quantize import Method

RUNTIME_BYTES = 400_000_000  # the interpreter, torch, transformers
_PROBE_TOKENS = 8 * 64  # on which the merge is proved, with three sets of logits
_HELD_OUT_TOKENS = 8 * 256  # on which "auto" measures
_SHARES = {0: 0.5, 8: 0.3, 4: 0.22}  # a graph's bytes over FP32's, by the bits of its linears


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model: all of its weights and one vocabulary matrix in FP32, its files, one position's logits."""

    weights: int
    vocabulary: int
    files: int
    logits: int
    hessian: int

    @classmethod
    def of(cls, base: Checkpoint) -> Sizes:
        vocabulary, hidden = int(base.config["vocab_size"]), int(base.config["hidden_size"])
        widest = int(base.config.get("intermediate_size") or 4 * hidden)
        files = sum(file.stat().st_size for file in base.path.glob("*.safetensors"))
        return cls(4 * base.parameters, 4 * vocabulary * hidden, files, 4 * vocabulary, 4 * widest * widest)


def memory(sizes: Sizes, stages: Collection[str], methods: Collection[Method]) -> int:
    """The most that a stage's process holds: of `stages` ("merge", "fp32") and of making, running `methods`' graphs.

    The merge holds the base in FP32 beside its mapped files while it loads them, beside logits and copies later.
    The export maps what was merged. A session of FP32 or FP16 packs FP32 weights. Quantizing and converting go weight
    by weight; pricing the head holds it with what 4 and 8 bits change of it, and GPTQ its widest input's Hessian in
    several forms.
    """
    peaks = [sizes.weights + 2 * WINDOW_TOKENS * sizes.logits]
    if "merge" in stages:
        peaks.append(sizes.weights + max(sizes.files, 2 * sizes.vocabulary + 3 * _PROBE_TOKENS * sizes.logits))
    if "fp32" in stages:
        peaks.append(sizes.weights + 3 * sizes.vocabulary // 2)
    peaks += [
        6 * sizes.vocabulary + 6 * sizes.hessian if method.calibrated else 2 * sizes.vocabulary for method in methods
    ]
    return RUNTIME_BYTES + max(peaks)


def disk(sizes: Sizes, stages: Collection[str], methods: Collection[Method], target: str) -> int:
    """What a build writes: the merge and its FP32 graph, each version in the cache and in the repository, and scratch.

    Scratch is the reference's log-probabilities and, while INT4 is chosen, another graph and its own reference; for
    CUDA also a graph in half precision.
    """
    kept = sizes.weights * len({"merge", "fp32"} & set(stages))
    graphs = [int((1.0 if method.stage == "export" else _SHARES[method.bits]) * sizes.weights) for method in methods]
    scratch = [0]
    for method, graph in zip(methods, graphs, strict=True):
        chosen = graph + _HELD_OUT_TOKENS * sizes.logits if method.name == "auto" else 0
        half = sizes.weights // 2 if method.bits and target == "cuda" else 0
        scratch.append(chosen + half)
    return kept + 2 * sum(graphs) + (LEAST_TOKENS + WINDOW_TOKENS) * sizes.logits + max(scratch)
