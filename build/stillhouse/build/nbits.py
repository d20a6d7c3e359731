"""Writes quantized weights into a graph: MatMul becomes MatMulNBits, the tied embedding shares the head's integers.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits,
GatherBlockQuantized). Scales lie in the file in half precision behind a Cast, which ONNX Runtime folds away when it
loads the graph: half the bytes of a scale, and the kernels see the float32 that they want.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.blocks import BlockWeight
from stillhouse.build.external import begin, put, values_of

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

ACCURACY_LEVEL = 4  # int8 × int8 kernels; level 0 decodes 6 to 16 times slower for 0.6 points of perplexity
HEAD = "/lm_head/MatMul"
EMBEDDING = "/model/embed_tokens/Gather"
_DOMAIN = "com.microsoft"
_Proto = TypeVar("_Proto", "NodeProto", "TensorProto")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A quantized weight as operators find it: its shape and blocks, and the tensors that they read."""

    rows: int
    columns: int
    bits: int
    block_size: int
    names: tuple[str, ...]


class QuantizedGraph:
    """The graph in `source` with the weights of `nodes` quantized, written to `destination` weight by weight.

    What `add` gets is written at once and not kept: memory holds the largest weight, not all of them. A tied embedding
    is read from the head's integers where `nodes` holds the head.
    """

    def __init__(self, source: Path, destination: Path, nodes: Collection[str]) -> None:
        import onnx

        self._source, self._folder = source, destination
        self._model = onnx.load(str(source / "model.onnx"), load_external_data=False)
        self._half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in self._model.graph.initializer)
        self._stored: dict[str, _Stored] = {}
        self._casts: list[NodeProto] = []  # of the scales; the embedding needs them before anything else
        self._embedding = self._take_out(nodes)
        begin(destination)
        for tensor in self._model.graph.initializer:
            if tensor.external_data:
                put(tensor, values_of(tensor, source), destination)

    def __contains__(self, node: str) -> bool:
        return node in self._stored

    def add(self, node: str, weight: BlockWeight) -> None:
        """Writes the weight of `node`."""
        from onnx import TensorProto, helper

        rows, columns = weight.integers.shape
        blocks = weight.scales.shape[1]
        stem = f"{node.strip('/').replace('/', '.')}.weight"
        padded = np.pad(weight.integers, ((0, 0), (0, blocks * weight.block_size - columns)))
        self._put(f"{stem}_quantized", _packed(padded, weight.bits).reshape(rows, blocks, -1))
        self._put(f"{stem}_scales", weight.scales)
        names = [f"{stem}_quantized", f"{stem}_scales"]
        if not self._half:
            names[1] = f"{stem}_scales_float"
            cast = helper.make_node("Cast", [f"{stem}_scales"], [names[1]], f"{node}/scales", to=TensorProto.FLOAT)
            self._casts.append(cast)
        if weight.zeros is not None:
            self._put(f"{stem}_zeros", _packed(weight.zeros, weight.bits))
            names.append(f"{stem}_zeros")
        self._stored[node] = _Stored(rows, columns, weight.bits, weight.block_size, tuple(names))

    def save(self) -> None:
        """Writes the graph itself, once all of its weights are there."""
        import onnx

        graph = self._model.graph
        nodes: list[NodeProto] = []
        for node in graph.node:
            if node.op_type == "MatMul" and node.name in self._stored:
                nodes.append(_matmul(node, self._stored[node.name], half=self._half))
            elif node.name == EMBEDDING and self._embedding in self._stored:
                nodes += self._lookup(node, self._stored[self._embedding])
            else:
                nodes.append(_copied(node))
        del graph.node[:]
        graph.node.extend([*self._casts, *nodes])
        onnx.save(self._model, str(self._folder / "model.onnx"))
        shutil.copyfile(self._source / "genai_config.json", self._folder / "genai_config.json")

    def _take_out(self, nodes: Collection[str]) -> str:
        """Takes the float weights of `nodes` from the graph; returns the node whose integers the embedding reads."""
        graph = self._model.graph
        constants = {tensor.name for tensor in graph.initializer}
        own = any(node.name == EMBEDDING and node.input[0] in constants for node in graph.node)
        embedding = EMBEDDING if own else HEAD
        for node in graph.node:
            if node.op_type == "MatMul" and node.name in nodes:
                del node.input[1]
            elif node.name == EMBEDDING and embedding in nodes:
                del node.input[0]
        used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        # A tied embedding leaves its Transpose behind.
        alive = [_copied(node) for node in graph.node if any(name in used for name in node.output)]
        read = {name for node in alive for name in node.input}
        kept = [_copied(tensor) for tensor in graph.initializer if tensor.name in read]
        del graph.node[:]
        graph.node.extend(alive)
        del graph.initializer[:]
        graph.initializer.extend(kept)
        return embedding

    def _lookup(self, node: NodeProto, stored: _Stored) -> list[NodeProto]:
        """Rows of the embedding from its integers, which are the head's own tensors where the two are tied."""
        from onnx import helper

        if stored.columns % stored.block_size:
            raise ValueError(f"an embedding of width {stored.columns} cannot be read in blocks of {stored.block_size}")
        stem = EMBEDDING.rpartition("/")[0]
        self._put(f"{stem}/shape", np.array([stored.rows, stored.columns * stored.bits // 8], np.int64))
        flat = helper.make_node("Reshape", [stored.names[0], f"{stem}/shape"], [f"{stem}/rows"], f"{stem}/Reshape")
        inputs = [flat.output[0], node.input[0], *stored.names[1:]]
        attributes = {"bits": stored.bits, "block_size": stored.block_size, "gather_axis": 0, "quantize_axis": 1}
        operator = "GatherBlockQuantized"
        return [flat, helper.make_node(operator, inputs, list(node.output), node.name, domain=_DOMAIN, **attributes)]

    def _put(self, name: str, values: NDArray[Any]) -> None:
        put(self._model.graph.initializer.add(name=name), values, self._folder)


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


def _matmul(node: NodeProto, stored: _Stored, *, half: bool) -> NodeProto:
    from onnx import helper

    attributes: dict[str, Any] = {"K": stored.columns, "N": stored.rows, "bits": stored.bits}
    attributes["block_size"] = stored.block_size
    if not half:  # levels are of the CPU's kernels
        attributes["accuracy_level"] = ACCURACY_LEVEL
    inputs = [node.input[0], *stored.names]
    return helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=_DOMAIN, **attributes)


def _copied(proto: _Proto) -> _Proto:
    """A copy that outlives the list that `proto` is taken from."""
    copy = type(proto)()
    copy.CopyFrom(proto)
    return copy


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
