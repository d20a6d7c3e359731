"""The graph holds and computes what was chosen, to the bit; calibration is what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.build import quantize as quantizing
from stillhouse.build.blocks import BlockWeight
from stillhouse.build.budget import footprint
from stillhouse.build.calibrate import calibrate, own_samples, sampled
from stillhouse.build.nbits import HEAD, QuantizedGraph, quantizable, read_quantized
from stillhouse.build.quantize import convert_fp16
from stillhouse.build.rounding import rounded
from stillhouse.build.stream import LayerStream
from stillhouse.build.texts import evaluation_text, token_ids
from stillhouse.build.verify import divergence, log_softmax, read_network
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.runner import OrtRunner

Quantize = Callable[..., dict[str, Any]]


def nothing(_: float) -> None:
    """Nobody is told how far it is."""


def write_quantized(source: Path, destination: Path, weights: dict[str, BlockWeight]) -> None:
    written = QuantizedGraph(source, destination, weights)
    for node, weight in weights.items():
        written.add(node, weight)
    written.save()


def test_half_precision_is_the_converters_own_weight_by_weight(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the converter over the whole graph, which takes the weights several times over in memory."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime.transformers.float16 import convert_float_to_float16

    monkeypatch.setattr(quantizing, "_AT_ONCE", 1000)
    convert_fp16(nothing, source=str(graph), destination=str(tmp_path))
    ours = onnx.load(str(tmp_path / "model.onnx"))
    theirs = convert_float_to_float16(
        onnx.load(str(graph / "model.onnx")), keep_io_types=["logits"], disable_shape_infer=True
    )
    assert [node.SerializeToString() for node in ours.graph.node] == [
        node.SerializeToString() for node in theirs.graph.node
    ]
    for own, other in zip(ours.graph.initializer, theirs.graph.initializer, strict=True):
        assert own.data_type == other.data_type, own.name
        assert np.array_equal(numpy_helper.to_array(own), numpy_helper.to_array(other)), own.name


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_graph_holds_the_chosen_integers_bit_for_bit(
    symmetric: bool, graph: Path, tiny_base: Path, tmp_path: Path
) -> None:
    stream = LayerStream(tiny_base)
    chosen = {
        node: rounded(stream.weight(node), "rtn", bits=8 if node == HEAD else 4, block_size=32, symmetric=symmetric)
        for node in quantizable(graph / "model.onnx")
    }
    write_quantized(graph, tmp_path, chosen)
    written = read_quantized(tmp_path)
    assert written.keys() == chosen.keys()
    for node, weight in chosen.items():
        assert np.array_equal(written[node].dequantized(), weight.dequantized()), node
    size = (tmp_path / "model.onnx.data").stat().st_size
    floats = footprint(graph, tiny_base, quantizable(graph / "model.onnx"))
    assert size < floats.fixed_bytes + sum(weight.nbytes for weight in chosen.values())


@pytest.mark.parametrize("head", [8, 4])
def test_the_graph_computes_with_the_chosen_weights_in_prefill_and_decode(
    head: int, graph: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Against transformers with the dequantized weights put in; what is left are level 4's 8-bit activations."""
    from transformers import AutoModelForCausalLM

    stream = LayerStream(tiny_base)
    chosen = {
        node: rounded(stream.weight(node), "rtn", bits=head if node == HEAD else 4, block_size=32)
        for node in quantizable(graph / "model.onnx")
    }
    write_quantized(graph, tmp_path, chosen)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    whole = {node: torch.from_numpy(weight.dequantized()) for node, weight in chosen.items()}
    model.model.embed_tokens.weight.data = whole[HEAD]  # tied
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = whole[f"/model/layers.{index}/attn/qkv_proj/MatMul"].split([128, 64, 64])
        for module, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True):
            module.weight.data = part
        attention.o_proj.weight.data = whole[f"/model/layers.{index}/attn/o_proj/MatMul"]
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(mlp, name).weight.data = whole[f"/model/layers.{index}/mlp/{name}/MatMul"]
    tokens = np.random.default_rng(0).integers(3, 1024, 60).tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
        plain = AutoModelForCausalLM.from_pretrained(tiny_base)(input_ids=torch.tensor([tokens])).logits[0].numpy()
    runner = OrtRunner(tmp_path / "model.onnx", network=read_network(tiny_base), slots=1, max_len=64)
    rows = [runner.prefill(0, tokens[:50], 0).copy()]
    rows += [runner.decode([tokens[place]], [place]).copy() for place in range(50, 60)]  # the buffer is one
    ours = np.concatenate(rows)
    near = float(np.abs(ours - expected).max())
    assert near < 0.1 * float(np.abs(expected).max())
    assert near < 0.25 * float(np.abs(ours - plain).max())


def test_the_same_inputs_give_the_same_bytes(quantized: Quantize, tmp_path: Path) -> None:
    records = [quantized(tmp_path / name) for name in ("first", "second")]
    assert records[0] == records[1]
    for name in ("model.onnx", "model.onnx.data"):
        assert len({sha256_of(tmp_path / folder / name) for folder in ("first", "second")}) == 1


def test_a_cuda_version_is_half_precision_throughout_and_holds_the_same_integers(
    quantized: Quantize, tiny_base: Path, tmp_path: Path
) -> None:
    import onnx

    for target in ("cpu", "cuda"):
        quantized(tmp_path / target, method="rtn", target=target)
    cpu, cuda = (read_quantized(tmp_path / target) for target in ("cpu", "cuda"))
    assert cpu.keys() == cuda.keys()
    assert all(np.array_equal(cpu[node].dequantized(), cuda[node].dequantized()) for node in cpu)
    model = onnx.load(str(tmp_path / "cuda" / "model.onnx"), load_external_data=False)
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.FLOAT not in types
    for target, provider in (("cpu", []), ("cuda", [{"cuda": {"enable_cuda_graph": "0"}}])):
        settings = json.loads((tmp_path / target / "genai_config.json").read_text())
        assert settings["model"]["decoder"]["session_options"]["provider_options"] == provider
    runner = OrtRunner(tmp_path / "cuda" / "model.onnx", network=read_network(tiny_base), slots=1, max_len=32)
    assert runner.cache.dtype == np.float16
    other = OrtRunner(tmp_path / "cpu" / "model.onnx", network=read_network(tiny_base), slots=1, max_len=32)
    rows = [log_softmax(each.prefill(0, list(range(5, 25)), 0)) for each in (runner, other)]
    assert float(divergence(*rows).mean()) < 0.02


def test_samples_follow_the_model_and_the_seed(graph: Path, tiny_base: Path) -> None:
    network = read_network(tiny_base)
    runs = [
        own_samples(nothing, graph / "model.onnx", tiny_base, network, sequences=4, length=24, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert {len(text) for text in runs[0]} == {24}
    logits = np.log(np.array([[0.5, 0.2, 0.3] + [1e-9] * 600], np.float32)).repeat(20_000, 0)
    drawn = np.bincount(sampled(logits, np.random.default_rng(0)), minlength=3)[:3] / 20_000
    assert drawn == pytest.approx([0.5, 0.2, 0.3], abs=0.015)


def test_calibration_text_may_be_a_file_and_must_be_long_enough(tiny_base: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "model": "unused",
        "checkpoint": str(tiny_base),
        "network": read_network(tiny_base).model_dump(),
    }
    text = tmp_path / "prose.txt"
    text.write_text(evaluation_text(None).content[:120_000], "utf-8")
    calibrate(nothing, **words, destination=str(tmp_path), text=str(text))
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["text"] == "prose.txt"
    ids = token_ids(evaluation_text(None), tiny_base / "tokenizer.json")
    assert content["windows"][0] in [ids[start : start + 256] for start in range(20_000)]
    assert not {tuple(window) for window in content["windows"]} & {tuple(window) for window in content["held_out"]}
    text.write_text("too short", "utf-8")
    with pytest.raises(StillhouseError, match="8192 are needed"):
        calibrate(nothing, **words, destination=str(tmp_path), text=str(text))
