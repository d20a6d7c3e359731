"""The quantize stage: which weights keep 8 bits, by which method the rest is rounded, and the proof of the choice.

method = "auto" prices every method on a few layers, makes the two best of the whole model, measures both through the
graph on text that calibrated neither, and takes the better one. Runs in a worker process.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.build.blocks import BlockWeight, bytes_of
from stillhouse.build.budget import footprint, hold_budget, kept_at_8_bits, named, quantized_bytes, spare_bytes
from stillhouse.build.calibrated import gptq_layers
from stillhouse.build.gptq import gptq, hessian_of
from stillhouse.build.nbits import EMBEDDING, HEAD, QuantizedGraph, quantizable, quantized_as
from stillhouse.build.prequantized import taken
from stillhouse.build.quantize import convert_fp16
from stillhouse.build.rounding import ROUNDINGS, rounded
from stillhouse.build.sensitivity import divergence_by_weight, place
from stillhouse.build.stream import LayerStream, layer_of
from stillhouse.build.verify import fidelity, log_softmax
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

CANDIDATES = (*ROUNDINGS, "gptq")
SYMMETRIC_CANDIDATES = ("rtn", "gptq")  # the others fit a zero point
FINALISTS = 2
DEFAULT_SHARE = 0.425  # of FP16's bytes, where the recipe sets no bound
_SAMPLED = 3  # layers on which every method is priced
_ROWS = 64  # positions of the reference that are worked on at a time
# What drops a candidate; a full disk or memory that ran out ends the build.
_FAULTS = (StillhouseError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(slots=True)
class _Job:
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

    @property
    def linears(self) -> list[str]:
        return [node for node in self.shapes if node not in (HEAD, EMBEDDING)]


def quantize(
    share: Share,
    *,
    checkpoint: str,
    graph: str,
    destination: str,
    network: dict[str, Any],
    bits: int,
    method: str,
    target: str = "cpu",
    block_size: int = 32,
    symmetric: bool = False,
    keep_int8: list[str] | None = None,
    max_bytes: int | None = None,
    max_bytes_share: float | None = None,
    calibration: str | None = None,
) -> dict[str, Any]:
    """Writes the FP32 graph in `graph` quantized to `destination`; returns the manifest's quantization record.

    `calibration` is the file that `calibrate` wrote: GPTQ, a budget and "auto" need it.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="stillhouse-quantize-") as scratch:
        source = Path(graph)
        if target == "cuda":  # its kernels read and write half precision
            source = Path(scratch) / "half"
            convert_fp16(lambda _: None, source=graph, destination=str(source), target="cuda")
        shapes = quantizable(source / "model.onnx")
        kept = kept_at_8_bits(shapes, keep_int8 or []) if bits == 4 else set(shapes)
        own = taken(Path(checkpoint), list(shapes)) if method == "auto" and bits == 4 else {}
        refuse_to_widen(own, shapes, keep_int8 or [])
        widths = {node: 8 if node in kept and node not in own else 4 for node in shapes}
        job = _Job(source, LayerStream(Path(checkpoint)), shapes, widths, block_size, symmetric, taken=own)
        size = footprint(source, Path(checkpoint), shapes)
        left = {node: shape for node, shape in shapes.items() if node not in own}
        least = size.fixed_bytes + sum(weight.nbytes for weight in own.values())
        least += quantized_bytes(left, widths, block_size, symmetric)
        if max_bytes is None and max_bytes_share is not None:
            max_bytes = int(max_bytes_share * size.fp16_bytes)
        elif max_bytes is None and method == "auto":
            max_bytes = max(least, int(DEFAULT_SHARE * size.fp16_bytes))
        spare = spare_bytes(max_bytes, least)
        record: dict[str, Any] = {"budget_bytes": max_bytes}
        if calibration is not None:
            text = json.loads(Path(calibration).read_text("utf-8"))
            job.windows, job.held_out = text.pop("windows"), text.pop("held_out")
            record["calibration"] = text
        names: tuple[str, ...] = (method,)
        if method == "auto":
            names = ("taken",) if own else SYMMETRIC_CANDIDATES if symmetric else CANDIDATES
        rows: list[dict[str, Any]] = [{"method": name} for name in names]
        chosen = _choose(share, job, rows, spare, network, Path(scratch))
        destination_ = Path(destination)
        destination_.mkdir(parents=True, exist_ok=True)
        for file in sorted((Path(scratch) / chosen["method"]).iterdir()):
            shutil.move(str(file), str(destination_ / file.name))
    hold_budget(max_bytes, destination_, Path(checkpoint))
    share(1.0)
    record |= {"method": chosen["method"], "bytes": chosen["bytes"], "candidates": rows}
    return {"quantization": record | _as_written(destination_, shapes, bits)}


def refuse_to_widen(own: dict[str, BlockWeight], shapes: dict[str, tuple[int, int]], asked: list[str]) -> None:
    """Raises StillhouseError where keep_int8 names a weight that the base brought in 4 bits."""
    for name in asked:
        if both := sorted(named(shapes, name) & own.keys()):
            raise StillhouseError(
                f"keep_int8: {name!r} names {both[0]}, which the base brought in 4 bits",
                hint="leave it out, or name the unquantized checkpoint as base",
            )


def _as_written(folder: Path, shapes: dict[str, tuple[int, int]], bits: int) -> dict[str, Any]:
    """The record's facts that the file itself says: the block size of the fewest bits, and what int4 has at 8."""
    written = {node: form for node, form in quantized_as(folder / "model.onnx").items() if node in shapes}
    fewest = min(width for width, _ in written.values())
    blocks = [block_size for width, block_size in written.values() if width == fewest]
    int8 = sorted(node for node, (width, _) in written.items() if width == 8) if bits == 4 else []
    return {"block_size": max(blocks, key=blocks.count), "int8_weights": int8}


def _choose(
    share: Share, job: _Job, rows: list[dict[str, Any]], spare: int, network: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """Places 8 bits, prices the methods of `rows`, makes the finalists, and marks and returns the best one's row."""
    spool = scratch / "reference.f32"
    ranked = rows
    if job.held_out and (spare or len(rows) > 1):
        costs, hidden = _price(lambda done: share(0.25 * done), job, rows)
        _spend(job, costs, spare)
        ranked = [row for row in rows if "note" not in row]
        for row in ranked:
            row["kl_estimated"] = _estimate(job, costs, row["method"])
        ranked = sorted(ranked, key=lambda row: float(row["kl_estimated"]))
        if len(rows) > 1:
            _write_reference(job.stream, hidden, spool)
    finalists: list[dict[str, Any]] = []
    for row in ranked:
        start, width = 0.25 + 0.75 * len(finalists) / FINALISTS, 0.75 / min(FINALISTS, len(rows))
        own = partial(_part, share, start, width)
        try:
            row |= _made_and_measured(own, job, row["method"], network, scratch, spool if len(rows) > 1 else None)
        except _FAULTS as fault:
            if len(rows) == 1:
                raise
            _drop(row, fault)
            continue
        finalists.append(row)
        if len(finalists) == FINALISTS:
            break
    if not finalists:
        reasons = "; ".join(f"{row['method']}: {row['note']}" for row in rows)
        raise StillhouseError(f"quantize: no method could round this model: {reasons}", hint="see the build log")
    best = min(finalists, key=lambda row: float(row.get("kl_mean", 0.0)))
    best["chosen"] = True
    return best


def _part(share: Share, start: float, width: float, done: float) -> None:
    """Passes on how much of a part of the whole is done."""
    share(start + width * done)


def _drop(row: dict[str, Any], fault: Exception) -> None:
    """Notes in a candidate's row, and in the log, why it is out."""
    row["note"] = str(fault) or type(fault).__name__
    print(f"{row['method']} is dropped: {row['note']}", file=sys.stderr)


def _made_and_measured(
    share: Share, job: _Job, method: str, network: dict[str, Any], scratch: Path, spool: Path | None
) -> dict[str, Any]:
    """Makes the whole model by `method`; what a table says of it, measured too where `spool` is the original's."""
    row = _make(lambda done: share(0.7 * done), job, method, scratch / method)
    if spool is not None:
        share(0.7)
        model = str(scratch / method / "model.onnx")
        figures = fidelity(lambda _: None, model=model, network=network, windows=job.held_out, spool=str(spool))
        row |= {key: figures[key] for key in ("tokens", "perplexity_ratio", "kl_mean", "top1_agreement")}
    return row


def _price(share: Share, job: _Job, rows: list[dict[str, Any]]) -> tuple[dict[str, dict[str, float]], Tensor]:
    """The divergence that each linear costs, to nearest at 4 and 8 bits; on a few layers, by each row's method too."""
    layers = job.stream.layers
    sampled = {round((index + 0.5) * layers / _SAMPLED - 0.5) for index in range(_SAMPLED)}

    def change(node: str, weight: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        variants = {"4": _rounded(job, weight, "rtn", 4), "8": _rounded(job, weight, "rtn", 8)}
        if layer_of(node) in sampled:
            for row in rows:
                if "note" in row:
                    continue
                try:
                    variants[row["method"]] = _by_method(job, weight, inputs, row["method"])
                except _FAULTS as fault:
                    if len(rows) == 1:
                        raise
                    _drop(row, fault)
        return {name: torch.from_numpy(variant.dequantized()).sub_(weight) for name, variant in variants.items()}

    return divergence_by_weight(share, job.stream, torch.tensor(job.held_out), job.linears, change)


def _spend(job: _Job, costs: dict[str, dict[str, float]], spare: int) -> None:
    """Gives 8 bits to where they spare most, within `spare` bytes."""
    four = [node for node in job.linears if job.bits[node] == 4]
    block, symmetric = job.block_size, job.symmetric
    extra = {
        node: bytes_of(*job.shapes[node], 8, block, symmetric=True)
        - bytes_of(*job.shapes[node], 4, block, symmetric=symmetric)
        for node in four
    }
    for node in place({node: (costs[node]["4"], costs[node]["8"]) for node in four}, extra, spare):
        job.bits[node] = 8


def _estimate(job: _Job, costs: dict[str, dict[str, float]], method: str) -> float:
    """The divergence, nats a token, of the whole model: to nearest, times how `method` compares where sampled."""
    sampled = [own for own in costs.values() if method in own]
    nearest = sum(own["4"] for own in sampled)
    better = sum(own[method] for own in sampled) / nearest if nearest > 0 else 1.0
    return sum(own["4"] * better if job.bits[node] == 4 else own["8"] for node, own in costs.items())


def _make(share: Share, job: _Job, method: str, folder: Path) -> dict[str, Any]:
    """Writes the graph quantized by `method` into `folder`; what a table says of it."""
    graph = QuantizedGraph(job.source, folder, job.shapes)
    said: dict[str, Any] = {}
    for node, weight in job.taken.items():
        graph.add(node, weight)
    if method == "gptq":
        bits = {node: job.bits[node] for node in job.linears}
        form: dict[str, Any] = {"block_size": job.block_size, "symmetric": job.symmetric}
        errors = gptq_layers(share, job.stream, torch.tensor(job.windows), bits, graph.add, **form)
        said["output_error"] = float(np.mean([error for error, _ in errors.values()] or [0.0]))
        said["output_error_to_nearest"] = float(np.mean([error for _, error in errors.values()] or [0.0]))
    by = method if method in ROUNDINGS else "rtn"
    for node in job.shapes:
        if node not in graph:
            graph.add(node, _rounded(job, job.stream.weight(node), by, job.bits[node]))
    graph.save()
    said["bytes"] = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    return said


def _by_method(job: _Job, weight: Tensor, inputs: Tensor, method: str) -> BlockWeight:
    """One weight at 4 bits by `method`, which may be GPTQ."""
    if method == "gptq":
        hessian = hessian_of(inputs)
        return gptq(weight, hessian, bits=4, block_size=job.block_size, symmetric=job.symmetric)
    return _rounded(job, weight, method, 4)


def _rounded(job: _Job, weight: Tensor, method: str, bits: int) -> BlockWeight:
    symmetric = job.symmetric or bits == 8
    return rounded(weight, method, bits=bits, block_size=job.block_size, symmetric=symmetric)


def _write_reference(stream: LayerStream, hidden: Tensor, spool: Path) -> None:
    """The original's log-probabilities of the held-out text, as verify reads them: (windows, W − 1, V) float32."""
    head = stream.head().T
    with torch.no_grad(), spool.open("wb") as stream_:
        rows = stream.final_norm()(hidden)[:, :-1].reshape(-1, hidden.shape[-1])
        for part in rows.split(_ROWS):
            stream_.write(log_softmax((part @ head).numpy()).data)
