"""The synthetic model: what its checkpoint holds, and what a decode step reads of a graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bandwidth
import synthetic

SMALL = synthetic.SHAPE | {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "vocab_size": 100}


def test_the_checkpoint_opens_as_a_qwen2_with_no_weight_missing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    synthetic.write_checkpoint(tmp_path, SMALL)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == len(model.state_dict())


def test_a_step_reads_the_constants_of_matrix_products_each_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import numpy as np
    from onnx import helper, numpy_helper

    shared = numpy_helper.from_array(np.ones((4, 4), np.float32), "shared")
    table = numpy_helper.from_array(np.ones((100, 4), np.float32), "table")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "shared"], ["y"]),
        helper.make_node("MatMul", ["y", "shared"], ["z"]),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1])
    z = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "small", [ids], [z], initializer=[shared, table])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert synthetic.bytes_a_token(tmp_path / "model.onnx") == 64


def test_the_bandwidth_of_a_small_array_is_measured() -> None:
    assert bandwidth.read_bandwidth_gb_s(1, gigabytes=0.02, repeats=1) > 0.1
