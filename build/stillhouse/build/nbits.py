"""Writes quantized weights into a graph: MatMul becomes MatMulNBits, the tied embedding shares the head's integers.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits,
GatherBlockQuantized). Scales lie in the file in half precision behind a Cast, which ONNX Runtime folds away when it
loads the graph: half the bytes of a scale, and the kernels see the float32 that they want.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.blocks import BlockWeight

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

ACCURACY_LEVEL = 4  # int8 × int8 kernels; level 0 decodes 6 to 16 times slower for 0.6 points of perplexity
HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"
_DOMAIN = "com.microsoft"


def write_quantized(source: Path, destination: Path, weights: Mapping[str, BlockWeight]) -> None:
    """The graph in `source` with the MatMul nodes that `weights` names quantized; others stay as they are.

    A tied embedding is read from the head's integers where `weights` holds the head.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor

    model = onnx.load(str(source / "model.onnx"), load_external_data=False)
    _replace(model, weights)
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for tensor in kept:
        if tensor.external_data:
            load_external_data_for_tensor(tensor, str(source))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    destination.mkdir(parents=True, exist_ok=True)
    (destination / "model.onnx.data").unlink(missing_ok=True)  # onnx appends to what is there
    onnx.save(
        model,
        str(destination / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    shutil.copyfile(source / "genai_config.json", destination / "genai_config.json")


def quantizable(graph_file: Path) -> dict[str, tuple[int, int]]:
    """The nodes whose weights can be quantized, and their (outputs, inputs): MatMul with a constant, the embedding.

    A tied embedding is not among them: it goes with the head.
    """
    import onnx

    graph = onnx.load(str(graph_file), load_external_data=False).graph
    constants = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found: dict[str, tuple[int, int]] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            columns, rows = constants[node.input[1]]
            found[node.name] = (rows, columns)
        elif node.name == EMBEDDING and node.input[0] in constants:
            rows, columns = constants[node.input[0]]
            found[node.name] = (rows, columns)
    return found


def read_quantized(folder: Path) -> dict[str, BlockWeight]:
    """The quantized weights of a graph by node name, as they lie in its file."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(folder / "model.onnx"))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}

    def array(name: str) -> NDArray[Any]:
        kept: NDArray[Any] = numpy_helper.to_array(tensors[casts.get(name, name)])
        return kept

    found: dict[str, BlockWeight] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        bits, rows, columns = attributes["bits"], attributes["N"], attributes["K"]
        packed = array(node.input[1]).reshape(rows, -1)
        zeros = array(node.input[3]).reshape(rows, -1) if len(node.input) > 3 and node.input[3] else None
        blocks = -(-columns // attributes["block_size"])
        found[node.name] = BlockWeight(
            _unpacked(packed, bits)[:, :columns],
            array(node.input[2]).reshape(rows, -1),
            None if zeros is None else _unpacked(zeros, bits)[:, :blocks],
            bits,
            attributes["block_size"],
        )
    return found


def quantized_as(graph_file: Path) -> dict[str, tuple[int, int]]:
    """The bits and the block size of each quantized node of a graph, read without its weights."""
    import onnx

    found: dict[str, tuple[int, int]] = {}
    for node in onnx.load(str(graph_file), load_external_data=False).graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            found[node.name] = (attributes["bits"], attributes["block_size"])
    return found


def _replace(model: ModelProto, weights: Mapping[str, BlockWeight]) -> None:
    """Puts MatMulNBits and, for the embedding, GatherBlockQuantized where MatMul and Gather were."""
    import onnx

    graph = model.graph
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer)
    stored: dict[str, list[str]] = {}
    first: list[NodeProto] = []  # the scales' casts, which the embedding needs before anything else
    for name, weight in weights.items():
        stored[name], casts = _store(graph, name, weight, half=half)
        first += casts
    constants = {tensor.name for tensor in graph.initializer}
    own = any(node.name == EMBEDDING and node.input[0] in constants for node in graph.node)
    source = EMBEDDING if own else HEAD
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.name in weights:
            nodes.append(_matmul(node, weights[node.name], stored[node.name], half=half))
        elif node.name == EMBEDDING and source in weights:
            nodes += _embedding(graph, node, weights[source], stored[source])
        else:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    used = {name for node in nodes for name in node.input}
    outputs = {output.name for output in graph.output}
    alive = [node for node in nodes if any(name in used or name in outputs for name in node.output)]
    del graph.node[:]
    graph.node.extend([*first, *alive])  # a tied embedding leaves its Transpose behind


def _store(graph: GraphProto, name: str, weight: BlockWeight, *, half: bool) -> tuple[list[str], list[NodeProto]]:
    """Adds the weight's tensors to the graph; their names as operators read them, and the Cast of the scales."""
    from onnx import TensorProto, helper

    rows, columns = weight.integers.shape
    blocks = weight.scales.shape[1]
    stem = f"{name.strip('/').replace('/', '.')}.weight"
    padded = np.pad(weight.integers, ((0, 0), (0, blocks * weight.block_size - columns)))
    _add(graph, f"{stem}_quantized", _packed(padded, weight.bits).reshape(rows, blocks, -1))
    _add(graph, f"{stem}_scales", weight.scales)
    names = [f"{stem}_quantized", f"{stem}_scales"]
    casts = []
    if not half:
        names[1] = f"{stem}_scales_float"
        casts.append(helper.make_node("Cast", [f"{stem}_scales"], [names[1]], f"{name}/scales", to=TensorProto.FLOAT))
    if weight.zeros is not None:
        _add(graph, f"{stem}_zeros", _packed(weight.zeros, weight.bits))
        names.append(f"{stem}_zeros")
    return names, casts


def _matmul(node: NodeProto, weight: BlockWeight, stored: list[str], *, half: bool) -> NodeProto:
    from onnx import helper

    rows, columns = weight.integers.shape
    attributes: dict[str, Any] = {"K": columns, "N": rows, "bits": weight.bits, "block_size": weight.block_size}
    if not half:  # levels are of the CPU's kernels
        attributes["accuracy_level"] = ACCURACY_LEVEL
    inputs = [node.input[0], *stored]
    return helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=_DOMAIN, **attributes)


def _embedding(graph: GraphProto, node: NodeProto, weight: BlockWeight, stored: list[str]) -> list[NodeProto]:
    """Rows of the embedding from its integers, which are the head's own tensors where the two are tied."""
    from onnx import helper, numpy_helper

    rows, columns = weight.integers.shape
    if columns % weight.block_size:
        raise ValueError(f"an embedding of width {columns} cannot be read in blocks of {weight.block_size}")
    stem = EMBEDDING.rpartition("/")[0]
    shape = np.array([rows, columns * weight.bits // 8], np.int64)
    graph.initializer.append(numpy_helper.from_array(shape, f"{stem}/shape"))
    flat = helper.make_node("Reshape", [stored[0], f"{stem}/shape"], [f"{stem}/rows"], f"{stem}/Reshape")
    inputs = [flat.output[0], node.input[1], *stored[1:]]
    attributes = {"bits": weight.bits, "block_size": weight.block_size, "gather_axis": 0, "quantize_axis": 1}
    operator = "GatherBlockQuantized"
    return [flat, helper.make_node(operator, inputs, list(node.output), node.name, domain=_DOMAIN, **attributes)]


def _add(graph: GraphProto, name: str, array: NDArray[Any]) -> None:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(N, M) integers as bytes: for 4 bits two a byte, the first in the low half; an odd last one stands alone."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed: NDArray[np.uint8] = (values[:, ::2] | (values[:, 1::2] << 4)).astype(np.uint8)
    return packed


def _unpacked(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_packed`, with the odd one's empty neighbour."""
    if bits == 8:
        return values
    unpacked: NDArray[np.uint8] = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
    return unpacked
