"""Bytes: what a version takes, what it may take, and the weights that the recipe wants kept at 8 bits."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from stillhouse.build.blocks import bytes_of
from stillhouse.build.nbits import EMBEDDING, HEAD
from stillhouse.build.publish import FILES
from stillhouse.build.tensors import TensorInfo
from stillhouse.engine.errors import StillhouseError

Shapes = Mapping[str, tuple[int, int]]
_NODE_BYTES = 700  # of a quantized node in model.onnx at most: names, attributes, tensors' places (650 were counted)
_LINEAR = re.compile(r"model\.layers\.(\d+)\.(?:self_)?(attn|mlp)\.(\w+)\.weight")
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}


@dataclass(frozen=True, slots=True)
class Footprint:
    """A version's bytes: of FP16's directory, and of all that quantizing leaves as it is."""

    fp16_bytes: int
    fixed_bytes: int


def footprint(graph: Path, checkpoint: Path, shapes: Shapes) -> Footprint:
    """The Footprint of the float graph in `graph` whose weights `shapes` (by node) are to be quantized."""
    import onnx

    model = onnx.load(str(graph / "model.onnx"), load_external_data=False)
    beside = sum((checkpoint / name).stat().st_size for name in FILES if (checkpoint / name).is_file())
    beside += sum((graph / name).stat().st_size for name in ("model.onnx", "genai_config.json"))
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    elements = sum(prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in floats)
    width = 2 if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer) else 4
    left = elements - sum(rows * columns for rows, columns in shapes.values())
    return Footprint(beside + 2 * elements, beside + width * left + _NODE_BYTES * len(shapes))


def quantized_bytes(shapes: Shapes, bits: Mapping[str, int], block_size: int, symmetric: bool) -> int:
    """Bytes of all weights in the file; those of 8 bits are symmetric."""
    return sum(
        bytes_of(rows, columns, bits[node], block_size, symmetric=symmetric or bits[node] == 8)
        for node, (rows, columns) in shapes.items()
    )


def spare_bytes(budget: int | None, least: int) -> int:
    """What is left of the budget. Raises StillhouseError where not even the least fits."""
    if budget is None:
        return 0
    if budget < least:
        raise StillhouseError(
            f"quantize: {budget / 1e6:.1f} MB are allowed, but the smallest version takes {least / 1e6:.1f} MB",
            hint="raise max_bytes or max_bytes_share, or keep fewer weights at 8 bits",
        )
    return budget - least


def hold_budget(budget: int | None, made: Path, checkpoint: Path) -> None:
    """Raises StillhouseError where the version's files, as they were written, exceed the budget."""
    places = [made / name if (made / name).is_file() else checkpoint / name for name in FILES]
    size = sum(place.stat().st_size for place in places if place.is_file())
    if budget is not None and size > budget:
        raise StillhouseError(
            f"quantize: {budget / 1e6:.3f} MB are allowed, but the version's files take {size / 1e6:.3f} MB",
            hint="raise max_bytes or max_bytes_share, or keep fewer weights at 8 bits",
        )


def kept_at_8_bits(nodes: Collection[str], asked: Collection[str]) -> set[str]:
    """The nodes that keep_int8 names. Raises StillhouseError for a name that matches nothing."""
    return set[str]().union(*(named(nodes, name) for name in asked))


def named(nodes: Collection[str], name: str) -> set[str]:
    """The nodes that a name in keep_int8 means: a kind of weight, or a single one. Raises StillhouseError for none."""
    stem, _, last = name.removeprefix("model.").removesuffix(".weight").rpartition(".")
    stem = stem.replace("self_attn", "attn")
    tied = EMBEDDING not in nodes
    words = "lm_head" if last == "head" or (last == "embed_tokens" and tied) else last
    names = {words} if any(f"/{words}/" in node for node in nodes) else {_FUSED.get(words, words)}
    found = {
        node
        for node in nodes
        if node.split("/")[-2] in names and (not stem or f".{stem}." in f".{node.replace('/', '.')}.")
    }
    if not found:
        kinds = ", ".join(sorted({node.split("/")[-2] for node in nodes}))
        raise StillhouseError(f"keep_int8: no weight is named {name!r}", hint=f"this model has: {kinds}")
    return found


def refuse_unknown(asked: Collection[str], tensors: Mapping[str, TensorInfo]) -> None:
    """Raises StillhouseError for a name in keep_int8 that none of a checkpoint's linears will have in the graph."""
    found = [match.groups() for name in tensors if (match := _LINEAR.fullmatch(name))]
    nodes = {
        f"/model/layers.{layer}/{block}/{own}/MatMul"
        for layer, block, kind in found
        for own in (kind, _FUSED.get(kind, kind))
    }
    kept_at_8_bits({*nodes, HEAD, EMBEDDING}, asked)
