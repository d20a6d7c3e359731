"""Where 8 bits go: what each weight costs at 4 bits and at 8, and what the budget buys with it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from stillhouse.build.blocks import bytes_of
from stillhouse.build.methods import Job
from stillhouse.build.nbits import EMBEDDING, HEAD
from stillhouse.build.sensitivity import divergence_by_weight, place
from stillhouse.build.stream import layer_of
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

Row = dict[str, object]
Costs = dict[str, dict[str, float]]
# What drops a candidate; a full disk or memory that ran out ends the build.
FAULTS = (StillhouseError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
_SAMPLED = 3  # layers on which every method is priced


def price(share: Share, job: Job, rows: list[Row]) -> tuple[Costs, Tensor]:
    """The divergence that each weight costs, to nearest at 4 and 8 bits; on a few layers, by each row's method too.

    Also returned: the original's hidden states (B, S, D) of the held-out texts before the final norm. A method that
    fails is dropped from `rows`, or raises where it is the only one.
    """
    sampled = sampled_layers(job)

    def change(node: str, weight: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        variants = {"4": job.rounded(weight, "rtn", 4), "8": job.rounded(weight, "rtn", 8)}
        if node not in (HEAD, EMBEDDING) and layer_of(node) in sampled:
            for row in rows:
                if "note" in row:
                    continue
                try:
                    variants[str(row["method"])] = job.by_method(weight, inputs, str(row["method"]))
                except FAULTS as fault:
                    if len(rows) == 1:
                        raise
                    drop(row, fault)
        return {name: torch.from_numpy(variant.dequantized()).sub_(weight) for name, variant in variants.items()}

    open_ = [node for node in job.shapes if node not in (HEAD, EMBEDDING) or job.bits[node] == 4]
    return divergence_by_weight(share, job.stream, torch.tensor(job.held_out), open_, change)


def sampled_layers(job: Job) -> list[int]:
    """The layers on which every method is priced, spread over the model."""
    layers = job.stream.layers
    return sorted({round((index + 0.5) * layers / _SAMPLED - 0.5) for index in range(_SAMPLED)})


def spend(job: Job, costs: Costs, spare: int) -> None:
    """Gives 8 bits to where they spare most, within `spare` bytes."""
    four = [node for node in costs if job.bits[node] == 4]
    extra = {
        node: bytes_of(*job.shapes[node], 8, job.block_size, symmetric=True)
        - bytes_of(*job.shapes[node], 4, job.block_size, symmetric=job.symmetric)
        for node in four
    }
    for node in place({node: (costs[node]["4"], costs[node]["8"]) for node in four}, extra, spare):
        job.bits[node] = 8


def estimate(job: Job, costs: Costs, method: str) -> float:
    """The divergence, nats a token, of the whole model: to nearest, times how `method` compares where sampled."""
    sampled = [own for own in costs.values() if method in own]
    nearest = sum(own["4"] for own in sampled)
    better = sum(own[method] for own in sampled) / nearest if nearest > 0 else 1.0
    return sum(own["4"] * better if job.bits[node] == 4 else own["8"] for node, own in costs.items())


def drop(row: Row, fault: Exception) -> None:
    """Notes in a candidate's row, and in the log, why it is out."""
    row["note"] = str(fault) or type(fault).__name__
    print(f"{row['method']} is dropped: {row['note']}", file=sys.stderr)
