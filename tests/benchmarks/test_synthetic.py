"""The synthetic model: what its checkpoint holds, and what a decode step reads of a graph."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bandwidth
import synthetic
import synthetic_model

SMALL = synthetic_model.SHAPE | {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "vocab_size": 100}


def test_the_checkpoint_opens_as_a_qwen2_with_no_weight_missing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    synthetic_model.write_checkpoint(tmp_path, SMALL)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == len(model.state_dict())


def test_a_step_needs_the_constants_of_matrix_products_each_once(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
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
    assert synthetic.bytes_in_file(tmp_path / "model.onnx") == 64


@pytest.mark.slow
def test_a_repeated_layer_computes_what_a_checkpoint_with_that_layer_repeated_does(
    tmp_path: Path, support_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.engine.directory import open_version
    from stillhouse.engine.runner import OrtRunner

    shape = synthetic_model.SHAPE | {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 49152}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(synthetic_model, "SHAPE", shape)
    monkeypatch.setattr(synthetic_model, "CACHE", tmp_path / "repeated")
    tokenizer = support_repository / "support-int4/1"
    repeated = synthetic_model.version_of(4, tokenizer)

    write = synthetic_model.write_checkpoint

    def write_repeated(folder: Path, of: dict[str, object], seed: int = 0) -> None:
        write(folder, of | {"num_hidden_layers": 2}, seed)
        repeat_in_checkpoint(folder, (2, 3))
        (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 4}))

    monkeypatch.setattr(synthetic_model, "CACHE", tmp_path / "whole")
    monkeypatch.setattr(synthetic_model, "write_checkpoint", write_repeated)
    monkeypatch.setattr(synthetic_model, "repeat_last_layer", lambda *_: None)
    logits = []
    for directory in (repeated, synthetic_model.version_of(4, tokenizer)):
        version = open_version(directory)
        runner = OrtRunner(version.model_path, network=version.manifest.network, slots=1, max_len=64)
        runner.prefill(0, [5, 6, 7, 8], 0)
        logits.append(runner.decode([9], [4]))
    assert np.array_equal(*logits)


def repeat_in_checkpoint(folder: Path, layers: tuple[int, ...]) -> None:
    """Adds `layers` with the second's weights, the rows of each matrix product moved up by the layer's number."""
    import torch
    from safetensors.torch import load_file, save_file

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    second = load_file(folder / "layer-01.safetensors")
    for layer in layers:
        tensors = {name: torch.roll(tensor, -layer, 0) for name, tensor in second.items()}
        for kind in ("weight", "bias"):  # query, key and value are one product
            names = [f"model.layers.1.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            moved = torch.roll(torch.cat([second[name] for name in names]), -layer, 0)
            parts = moved.split([len(second[name]) for name in names])
            tensors |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
        renamed = {name.replace("layers.1.", f"layers.{layer}."): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / f"layer-{layer:02}.safetensors", metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(renamed, f"layer-{layer:02}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_bandwidth_of_a_small_array_is_measured() -> None:
    assert bandwidth.read_bandwidth_gb_s(1, gigabytes=0.02, repeats=1) > 0.1
