"""The model that is quantized, and how a method rounds it: one weight alone, or the whole graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.build.blocks import BlockWeight
from stillhouse.build.budget import Shapes
from stillhouse.build.calibrated import gptq_layers
from stillhouse.build.gptq import gptq, hessian_of
from stillhouse.build.nbits import EMBEDDING, HEAD, QuantizedGraph
from stillhouse.build.rounding import ROUNDINGS, rounded
from stillhouse.build.stream import LayerStream
from stillhouse.build.worker import Share


@dataclass(slots=True)
class Job:
    """The model that is quantized: its float graph, and the bits of each weight."""

    source: Path
    stream: LayerStream
    shapes: dict[str, tuple[int, int]]
    bits: dict[str, int]
    block_size: int
    symmetric: bool
    windows: list[list[int]] = field(default_factory=list)
    held_out: list[list[int]] = field(default_factory=list)
    taken: dict[str, BlockWeight] = field(default_factory=dict)

    def rounded(self, weight: Tensor, method: str, bits: int) -> BlockWeight:
        """`weight` by one of ROUNDINGS; 8 bits are symmetric."""
        symmetric = self.symmetric or bits == 8
        return rounded(weight, method, bits=bits, block_size=self.block_size, symmetric=symmetric)

    def by_method(self, weight: Tensor, inputs: Tensor, method: str) -> BlockWeight:
        """One weight at 4 bits by `method`, which may be GPTQ on `inputs` (…, K)."""
        if method == "gptq":
            return gptq(weight, hessian_of(inputs), bits=4, block_size=self.block_size, symmetric=self.symmetric)
        return self.rounded(weight, method, 4)


def narrow(shapes: Shapes, block_size: int, symmetric: bool) -> set[str]:
    """The head and the embedding where 4 bits can hold them.

    Older runtimes count an embedding's zero points over all rows, as if none left half a byte empty: they find them
    where each row has an even number (GatherBlockQuantized, zero_points_ptr[scale_idx >> 1]).
    """
    ends = {HEAD, EMBEDDING} & shapes.keys()
    read_as_rows = EMBEDDING if EMBEDDING in ends else HEAD
    return {node for node in ends if symmetric or node != read_as_rows or shapes[node][1] // block_size % 2 == 0}


def make(share: Share, job: Job, method: str, folder: Path) -> dict[str, Any]:
    """Writes the graph quantized by `method` into `folder`; what a table says of it."""
    graph = QuantizedGraph(job.source, folder, job.shapes)
    said: dict[str, Any] = {}
    for node, weight in job.taken.items():
        graph.add(node, weight)
    if method == "gptq":
        # Head and embedding at 8 bits are rounded to nearest below.
        bits = {node: width for node, width in job.bits.items() if node not in (HEAD, EMBEDDING) or width == 4}
        form: dict[str, Any] = {"block_size": job.block_size, "symmetric": job.symmetric}
        errors = gptq_layers(share, job.stream, torch.tensor(job.windows), bits, graph.add, **form)
        said["output_error"] = float(np.mean([error for error, _ in errors.values()] or [0.0]))
        said["output_error_to_nearest"] = float(np.mean([error for _, error in errors.values()] or [0.0]))
    by = method if method in ROUNDINGS else "rtn"
    for node in job.shapes:
        if node not in graph:
            graph.add(node, job.rounded(job.stream.weight(node), by, job.bits[node]))
    graph.save()
    said["bytes"] = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    return said
