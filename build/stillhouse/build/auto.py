"""The quantize stage: which weights keep 8 bits, by which method the rest is rounded, and the proof of the choice.

method = "auto" prices every method on a few layers, makes the two best of the whole model, measures both through the
graph on text that calibrated neither, and takes the better one. Runs in a worker process.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.build.blocks import BlockWeight
from stillhouse.build.budget import (
    Footprint,
    footprint,
    hold_budget,
    kept_at_8_bits,
    named,
    quantized_bytes,
    spare_bytes,
)
from stillhouse.build.methods import Job, make, narrow
from stillhouse.build.nbits import EMBEDDING, HEAD, quantizable, quantized_as
from stillhouse.build.prequantized import taken
from stillhouse.build.pricing import FAULTS, drop, estimate, price, sampled_layers, spend
from stillhouse.build.quantize import convert_fp16
from stillhouse.build.rounding import ROUNDINGS
from stillhouse.build.stream import LayerStream
from stillhouse.build.verify import fidelity, log_softmax
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

CANDIDATES = (*ROUNDINGS, "gptq")
SYMMETRIC_CANDIDATES = ("rtn", "gptq")  # the others fit a zero point
FINALISTS = 2
DEFAULT_SHARE = 0.425  # of FP16's bytes, where the recipe sets no bound
_ROWS = 64  # positions of the reference that are worked on at a time


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
        asked = kept_at_8_bits(shapes, keep_int8 or []) if bits == 4 else set(shapes)
        own = taken(Path(checkpoint), list(shapes)) if method == "auto" and bits == 4 else {}
        refuse_to_widen(own, shapes, keep_int8 or [])
        kept = (asked | ({HEAD, EMBEDDING} & shapes.keys())) - own.keys()
        widths = {node: 8 if node in kept else 4 for node in shapes}
        job = Job(source, LayerStream(Path(checkpoint)), shapes, widths, block_size, symmetric, taken=own)
        record: dict[str, Any] = {}
        if calibration is not None:
            text = json.loads(Path(calibration).read_text("utf-8"))
            job.windows, job.held_out = text.pop("windows"), text.pop("held_out")
            record["calibration"] = text
        size = footprint(source, Path(checkpoint), shapes)
        if max_bytes is None and max_bytes_share is not None:
            max_bytes = int(max_bytes_share * size.fp16_bytes)
        elif max_bytes is None and method == "auto":
            max_bytes = max(least_bytes(job, size), int(DEFAULT_SHARE * size.fp16_bytes))
        if job.held_out and max_bytes is not None:  # what each weight costs will be known, and there are bytes to spare
            job.bits |= dict.fromkeys(narrow(shapes, block_size, symmetric) - asked, 4)
        spare = spare_bytes(max_bytes, least_bytes(job, size))
        record["budget_bytes"] = max_bytes
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


def least_bytes(job: Job, size: Footprint) -> int:
    """Bytes of the version's directory with the bits of `job`."""
    left = {node: shape for node, shape in job.shapes.items() if node not in job.taken}
    taken_over = sum(weight.nbytes for weight in job.taken.values())
    return size.fixed_bytes + taken_over + quantized_bytes(left, job.bits, job.block_size, job.symmetric)


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
    share: Share, job: Job, rows: list[dict[str, Any]], spare: int, network: dict[str, Any], scratch: Path
) -> dict[str, Any]:
    """Places 8 bits, prices the methods of `rows`, makes the finalists, and marks and returns the best one's row."""
    spool = scratch / "reference.f32"
    ranked = rows
    if job.held_out and (spare or len(rows) > 1):
        costs, hidden = price(lambda done: share(0.25 * done), job, rows)
        spend(job, costs, spare)
        ranked = [row for row in rows if "note" not in row]
        for row in ranked:
            row["kl_estimated"] = estimate(job, costs, row["method"])
        ranked = sorted(ranked, key=lambda row: float(row["kl_estimated"]))
        if len(rows) > 1:
            _write_reference(job.stream, hidden, spool)
    finalists: list[dict[str, Any]] = []
    for row in ranked:
        start, width = 0.25 + 0.75 * len(finalists) / FINALISTS, 0.75 / min(FINALISTS, len(rows))
        own = partial(_part, share, start, width)
        try:
            row |= _made_and_measured(own, job, row["method"], network, scratch, spool if len(rows) > 1 else None)
        except FAULTS as fault:
            if len(rows) == 1:
                raise
            drop(row, fault)
            continue
        finalists.append(row)
        if len(finalists) == FINALISTS:
            break
    if not finalists:
        reasons = "; ".join(f"{row['method']}: {row['note']}" for row in rows)
        raise StillhouseError(f"quantize: no method could round this model: {reasons}", hint="see the build log")
    if len(finalists) > 1:
        layers = ", ".join(map(str, sampled_layers(job)))
        for row in ranked:
            if "kl_mean" not in row and "note" not in row:
                row["note"] = f"priced on the held-out text by its rounding of layers {layers}; not made of the whole"
    best = min(finalists, key=lambda row: float(row.get("kl_mean", 0.0)))
    best["chosen"] = True
    return best


def _part(share: Share, start: float, width: float, done: float) -> None:
    """Passes on how much of a part of the whole is done."""
    share(start + width * done)


def _made_and_measured(
    share: Share, job: Job, method: str, network: dict[str, Any], scratch: Path, spool: Path | None
) -> dict[str, Any]:
    """Makes the whole model by `method`; what a table says of it, measured too where `spool` is the original's."""
    row = make(lambda done: share(0.7 * done), job, method, scratch / method)
    if spool is not None:
        share(0.7)
        model = str(scratch / method / "model.onnx")
        figures = fidelity(lambda _: None, model=model, network=network, windows=job.held_out, spool=str(spool))
        row |= {key: figures[key] for key in ("tokens", "perplexity_ratio", "kl_mean", "top1_agreement")}
    return row


def _write_reference(stream: LayerStream, hidden: Tensor, spool: Path) -> None:
    """The original's log-probabilities of the held-out text, as verify reads them: (windows, W − 1, V) float32."""
    head = stream.head().T
    with torch.no_grad(), spool.open("wb") as stream_:
        rows = stream.final_norm()(hidden)[:, :-1].reshape(-1, hidden.shape[-1])
        for part in rows.split(_ROWS):
            stream_.write(log_softmax((part @ head).numpy()).data)
