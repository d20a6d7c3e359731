"""Weights packed by ONNX Runtime: what is written, and that it computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from stillhouse.engine.session import pack_weights

WIDTH = 64


def write_product(path: Path) -> None:
    """y = (x·W)·(2W): weights beside the graph, one of them for the optimizer to fold."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["w", "w"], ["twice"]),
        helper.make_node("MatMul", ["xw", "twice"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


def test_packed_weights_compute_the_same_and_nothing_else_is_left(tmp_path: Path) -> None:
    model, target = tmp_path / "model.onnx", tmp_path / "packed" / "model.onnx"
    target.parent.mkdir()
    write_product(model)
    pack_weights(model, target)
    assert sorted(file.name for file in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    answers = [
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (model, target)
    ]
    np.testing.assert_array_equal(*answers)
    assert not any(node.op_type == "Add" for node in onnx.load(target, load_external_data=False).graph.node)
