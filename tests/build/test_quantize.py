"""Rounding does what it says: GPTQ beats rounding to nearest, the graph holds what was chosen, bytes are spent well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.build import auto, calibrated, pipeline, rounding
from stillhouse.build import quantize as quantizing
from stillhouse.build.auto import quantize
from stillhouse.build.blocks import BlockWeight, bytes_of
from stillhouse.build.budget import footprint, hold_budget, kept_at_8_bits
from stillhouse.build.calibrate import calibrate, own_samples, sampled
from stillhouse.build.calibrated import gptq_layers
from stillhouse.build.gptq import gptq, hessian_of, output_error
from stillhouse.build.nbits import EMBEDDING, HEAD, QuantizedGraph, quantizable, read_quantized
from stillhouse.build.plan import plan
from stillhouse.build.publish import FILES
from stillhouse.build.quantize import METHODS, convert_fp16, stage_options
from stillhouse.build.recipe import QuantizeOptions, load_recipe
from stillhouse.build.rounding import ROUNDINGS, rounded
from stillhouse.build.sensitivity import divergence_by_weight, place
from stillhouse.build.stream import LayerStream
from stillhouse.build.texts import LEAST_TOKENS, evaluation_text, token_ids
from stillhouse.build.verify import divergence, log_softmax, read_network
from stillhouse.build.worker import run_stage
from stillhouse.engine.directory import open_version, sha256_of
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.runner import OrtRunner

Quantize = Callable[..., dict[str, Any]]


def nothing(_: float) -> None:
    """Nobody is told how far it is."""


@pytest.fixture(scope="module")
def graph(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in FP32."""
    folder = tmp_path_factory.mktemp("graph")
    arguments: dict[str, Any] = {"checkpoint": str(tiny_base), "destination": str(folder / "fp32")}
    arguments |= {"precision": "fp32", "target": "cpu", "options": {}}
    run_stage("export", arguments, log=folder / "export.log", share=nothing)
    return folder / "fp32"


@pytest.fixture(scope="module")
def calibration(graph: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's own samples."""
    folder = tmp_path_factory.mktemp("calibration")
    network = read_network(tiny_base).model_dump()
    calibrate(
        nothing, model=str(graph / "model.onnx"), checkpoint=str(tiny_base), network=network, destination=str(folder)
    )
    return folder / "calibration.json"


@pytest.fixture(scope="module")
def make(graph: Path, tiny_base: Path, calibration: Path) -> Quantize:
    """Runs the quantize stage on the tiny base; returns its record."""

    def run(destination: Path, **words: Any) -> dict[str, Any]:
        network = read_network(tiny_base).model_dump()
        asked: dict[str, Any] = {"bits": 4, "method": "gptq", "calibration": str(calibration)} | words
        result = quantize(
            nothing,
            checkpoint=str(tiny_base),
            graph=str(graph),
            destination=str(destination),
            network=network,
            **asked,
        )
        record: dict[str, Any] = result["quantization"]
        return record

    return run


def write_quantized(source: Path, destination: Path, weights: dict[str, BlockWeight]) -> None:
    written = QuantizedGraph(source, destination, weights)
    for node, weight in weights.items():
        written.add(node, weight)
    written.save()


def correlated(columns: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns), and inputs (2048, columns) that go together as a layer's do."""
    torch.manual_seed(seed)
    mixing = torch.randn(columns // 4, columns)
    return torch.randn(rows, columns), torch.randn(2048, columns // 4) @ mixing + 0.3 * torch.randn(2048, columns)


@pytest.mark.parametrize("method", [*ROUNDINGS, "gptq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_stays_within_half_a_step_of_what_its_range_holds(method: str, bits: int) -> None:
    weight, inputs = correlated(96, 8)
    if method == "gptq":
        own = gptq(weight, hessian_of(inputs), bits=bits, block_size=32)
    else:
        own = rounded(weight, method, bits=bits, block_size=32)
    assert own.integers.max() < 2**bits
    relative = np.linalg.norm(own.dequantized() - weight.numpy()) / np.linalg.norm(weight.numpy())
    assert relative < (0.25 if bits == 4 else 0.02)


def test_a_large_weight_is_rounded_part_by_part_to_the_same_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = correlated(96, 50)
    form: dict[str, Any] = {"bits": 8, "block_size": 32, "symmetric": True}
    whole = rounded(weight, "rtn", **form)
    monkeypatch.setattr(rounding, "_AT_ONCE", 700)  # seven rows
    parts = rounded(weight, "rtn", **form)
    assert np.array_equal(parts.integers, whole.integers)
    assert np.array_equal(parts.scales, whole.scales)


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


def test_gptq_halves_the_output_error_of_correlated_inputs() -> None:
    weight, inputs = correlated(256, 64)
    hessian = hessian_of(inputs)
    ours = gptq(weight, hessian, bits=4, block_size=32)
    nearest = rounded(weight, "rtn", bits=4, block_size=32)
    errors = [output_error(weight, torch.from_numpy(each.dequantized()), hessian) for each in (ours, nearest)]
    assert (ours.integers != nearest.integers).mean() > 0.1
    assert errors[0] < 0.5 * errors[1]
    exact = ((torch.from_numpy(ours.dequantized()) - weight) @ inputs.T).square().sum() / (
        weight @ inputs.T
    ).square().sum()
    assert errors[0] == pytest.approx(float(exact), rel=1e-3)


def test_gptq_takes_a_last_block_that_is_short_and_inputs_that_never_move() -> None:
    weight, inputs = correlated(80, 16)
    inputs[:, 5] = 0
    own = gptq(weight, hessian_of(inputs), bits=4, block_size=32)
    assert own.integers.shape == (16, 80)
    assert own.scales.shape == (16, 3)
    assert np.isfinite(own.dequantized()).all()


def test_gptq_beats_rounding_to_nearest_in_every_layer(tiny_base: Path, calibration: Path) -> None:
    stream, windows = LayerStream(tiny_base), json.loads(calibration.read_text())["windows"]
    bits = {f"/model/layers.{index}/{name}/MatMul": 4 for index in range(2) for name in LINEARS}
    weights: dict[str, BlockWeight] = {}
    errors = gptq_layers(nothing, stream, torch.tensor(windows), bits, weights.__setitem__, block_size=32)
    assert weights.keys() == errors.keys() == bits.keys()
    for node, (ours, nearest) in errors.items():
        assert ours < 0.9 * nearest, node


def test_gptq_leaves_weights_alone_that_need_no_rounding(tiny_base: Path, calibration: Path, tmp_path: Path) -> None:
    """Zeros, and weights that lie on the grid: to nearest has no error there, and GPTQ cannot do better."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(str(folder / "model.safetensors"))
    down, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate"))
    tensors[down].zero_()
    tensors[gate] = ((torch.arange(tensors[gate].numel()) % 16 - 7) / 32).reshape(tensors[gate].shape)
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    bits = {f"/model/layers.0/mlp/{name}_proj/MatMul": 4 for name in ("down", "gate")}
    windows = torch.tensor(json.loads(calibration.read_text())["windows"][:2])
    weights: dict[str, BlockWeight] = {}
    errors = gptq_layers(nothing, LayerStream(folder), windows, bits, weights.__setitem__, block_size=32)
    for node, name in zip(bits, (down, gate), strict=True):
        assert np.abs(weights[node].dequantized() - tensors[name].numpy()).max() < 1e-6
        assert all(np.isfinite(errors[node]))


LINEARS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")


def test_a_gptq_that_does_nothing_is_an_error(
    tiny_base: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearest(weight: torch.Tensor, _: torch.Tensor, **words: Any) -> BlockWeight:
        return rounded(weight, "rtn", **words)

    monkeypatch.setattr(calibrated, "gptq", nearest)
    windows = torch.tensor(json.loads(calibration.read_text())["windows"][:2])
    bits, kept = {"/model/layers.0/mlp/down_proj/MatMul": 4}, dict[str, BlockWeight]()
    with pytest.raises(StillhouseError, match=r"GPTQ did nothing for /model/layers\.0/mlp/down_proj"):
        gptq_layers(nothing, LayerStream(tiny_base), windows, bits, kept.__setitem__, block_size=32)


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


def test_the_graph_computes_with_the_chosen_weights_in_prefill_and_decode(
    graph: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Against transformers with the dequantized weights put in; what is left are level 4's 8-bit activations."""
    from transformers import AutoModelForCausalLM

    stream = LayerStream(tiny_base)
    chosen = {
        node: rounded(stream.weight(node), "rtn", bits=8 if node == HEAD else 4, block_size=32)
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


def test_sensitivity_finds_the_weight_that_matters(tiny_base: Path, calibration: Path) -> None:
    """Priced by one pass, against the divergence measured with the weight really changed."""
    from transformers import AutoModelForCausalLM

    windows = torch.tensor(json.loads(calibration.read_text())["held_out"])
    node = "/model/layers.1/mlp/down_proj/MatMul"
    torch.manual_seed(0)
    noise = torch.randn(128, 256) * 0.01

    def change(_: str, weight: torch.Tensor, __: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"once": noise[: len(weight), : weight.shape[1]], "twice": 2 * noise[: len(weight), : weight.shape[1]]}

    costs, _ = divergence_by_weight(nothing, LayerStream(tiny_base), windows, [node], change)
    assert costs[node]["twice"] == pytest.approx(4 * costs[node]["once"], rel=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(input_ids=windows).logits.reshape(-1, 1024).numpy()
        model.model.layers[1].mlp.down_proj.weight += noise
        after = model(input_ids=windows).logits.reshape(-1, 1024).numpy()
    measured = float(divergence(log_softmax(before), log_softmax(after)).mean())
    assert costs[node]["once"] == pytest.approx(measured, rel=0.25)


def test_bytes_go_where_each_spares_most() -> None:
    costs = {"a": (0.5, 0.1), "b": (0.3, 0.0), "c": (0.2, 0.0), "worse": (0.1, 0.2)}
    extra = {"a": 100, "b": 50, "c": 60, "worse": 10}
    assert place(costs, extra, 160) == ["b", "a"]
    assert place(costs, extra, 115) == ["b", "c"]
    assert place(costs, extra, 1000) == ["b", "a", "c"]
    assert place(costs, extra, 0) == []


def test_keep_int8_takes_heads_kinds_and_single_weights() -> None:
    nodes = [f"/model/layers.{index}/{name}/MatMul" for index in (1, 11) for name in LINEARS] + [HEAD, EMBEDDING]
    always = {HEAD, EMBEDDING}
    assert kept_at_8_bits(nodes, []) == always
    assert kept_at_8_bits(nodes, ["head", "lm_head"]) == always
    assert kept_at_8_bits(nodes, ["down_proj"]) - always == {
        "/model/layers.1/mlp/down_proj/MatMul",
        "/model/layers.11/mlp/down_proj/MatMul",
    }
    for name in ("layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.weight"):
        assert kept_at_8_bits(nodes, [name]) - always == {"/model/layers.1/mlp/down_proj/MatMul"}
    assert kept_at_8_bits(nodes, ["layers.11.self_attn.q_proj"]) - always == {"/model/layers.11/attn/qkv_proj/MatMul"}
    with pytest.raises(StillhouseError, match="no weight is named 'gate'"):
        kept_at_8_bits(nodes, ["gate"])


def test_auto_records_its_table_and_takes_the_best_that_fits(make: Quantize, tiny_base: Path, tmp_path: Path) -> None:
    record = make(tmp_path / "free", method="auto")
    table = {row["method"]: row for row in record["candidates"]}
    assert set(table) == {"rtn", "k_quant", "hqq", "gptq"}
    assert all(row["kl_estimated"] > 0 for row in table.values())
    measured = [row for row in table.values() if "kl_mean" in row]
    assert len(measured) == 2
    assert [row["method"] for row in table.values() if row.get("chosen")] == [record["method"]]
    assert record["method"] == min(measured, key=lambda row: row["kl_mean"])["method"]
    least = record["budget_bytes"]
    roomy = make(tmp_path / "roomy", max_bytes=least + 30_000)
    beside = sum((tiny_base / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json"))
    assert beside + roomy["bytes"] <= least + 30_000
    assert len(roomy["int8_weights"]) > len(record["int8_weights"])
    with pytest.raises(StillhouseError, match="the smallest version takes"):
        make(tmp_path / "tight", max_bytes=200_000)


def test_a_candidate_that_fails_is_noted_and_the_others_go_on(
    make: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise StillhouseError("GPTQ did nothing")

    monkeypatch.setattr(auto, "gptq_layers", fails)
    record = make(tmp_path / "late", method="auto", symmetric=True)
    assert {row["method"]: row.get("note") for row in record["candidates"]} == {"rtn": None, "gptq": "GPTQ did nothing"}
    assert record["method"] == "rtn"
    monkeypatch.setattr(auto, "_by_method", fails)
    with pytest.raises(StillhouseError, match="no method could round this model: rtn: GPTQ did nothing; gptq: GPTQ"):
        make(tmp_path / "all", method="auto", symmetric=True)
    with pytest.raises(StillhouseError, match=r"^GPTQ did nothing"):
        make(tmp_path / "alone", method="gptq")


def test_where_the_budget_has_room_for_all_every_weight_keeps_8_bits(make: Quantize, tmp_path: Path) -> None:
    record = make(tmp_path, method="rtn", max_bytes=10_000_000)
    assert (record["block_size"], len(record["int8_weights"])) == (32, 2 * len(LINEARS) + 1)


def test_a_version_that_was_written_larger_than_allowed_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 1000)
    beside = sum((tiny_base / name).stat().st_size for name in FILES if (tiny_base / name).is_file())
    hold_budget(beside + 1000, tmp_path, tiny_base)
    hold_budget(None, tmp_path, tiny_base)
    with pytest.raises(StillhouseError, match="the version's files take"):
        hold_budget(beside + 999, tmp_path, tiny_base)


def test_the_same_inputs_give_the_same_bytes(make: Quantize, tmp_path: Path) -> None:
    records = [make(tmp_path / name) for name in ("first", "second")]
    assert records[0] == records[1]
    for name in ("model.onnx", "model.onnx.data"):
        assert len({sha256_of(tmp_path / folder / name) for folder in ("first", "second")}) == 1


def test_a_cuda_version_is_half_precision_throughout_and_holds_the_same_integers(
    make: Quantize, tiny_base: Path, tmp_path: Path
) -> None:
    import onnx

    for target in ("cpu", "cuda"):
        make(tmp_path / target, method="rtn", target=target)
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


def test_words_that_mean_nothing_to_a_precision_are_refused(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="keep_int8 means nothing") as refused:
        stage_options(METHODS["int8"][0], QuantizeOptions(keep_int8=["down_proj"]))
    assert refused.value.hint == "it is an option of int4"
    with pytest.raises(UsageError, match="block_size means nothing") as refused:
        stage_options(METHODS["fp16"][0], QuantizeOptions(block_size=64))
    assert refused.value.hint == "it is an option of int8 and int4"
    rows = {row.name: row for row in METHODS["int4"]}
    for name in ("k_quant", "hqq"):
        with pytest.raises(UsageError, match=f"{name} fits a zero point"):
            stage_options(rows[name], QuantizeOptions(method=name, symmetric=True))
    assert stage_options(rows["gptq"], QuantizeOptions(symmetric=True))["symmetric"] is True
    recipe = load_recipe(write_recipe(more='[quantize.int4]\nmethod = "gptq"\nmax_bytes_share = 0.4\n'))
    assert recipe.options("int4").max_bytes_share == 0.4
    with pytest.raises(StillhouseError, match=r"quantize\.int4\.calibration: no such file"):
        load_recipe(write_recipe(more='[quantize.int4]\ncalibration = "nowhere.txt"\n'))


def test_options_that_fit_neither_base_nor_texts_are_refused_before_a_weight_is_loaded(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(evaluation_text(None).content, "utf-8")
    short = tmp_path / "short.txt"
    short.write_text("a few words", "utf-8")
    for more, words in (
        ("block_size = 256", "an embedding of width 128 has no whole blocks of 256"),
        ('keep_int8 = ["down_prj"]', "no weight is named 'down_prj'"),
        ('keep_int8 = ["layers.7.mlp.down_proj"]', "no weight is named 'layers.7.mlp.down_proj'"),
        (f'calibration = "{short}"', "8192 are needed"),
        (f'calibration = "{text}"', "is the text that the gate is held on"),
    ):
        recipe = load_recipe(write_recipe(precisions='"int4"', more=f"[quantize.int4]\n{more}\n"))
        with pytest.raises(StillhouseError, match=words):
            plan(recipe, tmp_path / "repository")
    fine = 'keep_int8 = ["q_proj", "qkv_proj", "lm_head", "layers.1.self_attn.o_proj"]'
    recipe = load_recipe(write_recipe(precisions='"int4"', more=f"[quantize.int4]\n{fine}\n"))
    assert plan(recipe, tmp_path / "repository").versions[0].options["keep_int8"][0] == "q_proj"


def test_bytes_are_counted_as_the_file_has_them() -> None:
    assert bytes_of(2, 64, 4, 32, symmetric=True) == 2 * (32 + 4)
    assert bytes_of(2, 64, 4, 32, symmetric=False) == 2 * (32 + 4 + 1)
    assert bytes_of(1, 96, 4, 32, symmetric=False) == 48 + 6 + 2
    assert bytes_of(1, 64, 8, 32, symmetric=False) == 64 + 4 + 2


@pytest.fixture(scope="module")
def example(base_dir: Path, kept_cache: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's recipe as it stands, built: `support_repository` may round INT4 by a quicker method."""
    assert base_dir.is_dir()
    assert kept_cache
    repository = tmp_path_factory.mktemp("example")
    built = pipeline.build(load_recipe(repo_root / "examples" / "support" / "recipe.toml"), repository)
    assert [result.status for result in built.results] == ["published"] * 3
    return repository


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_is_small_and_close_to_the_original(example: Path) -> None:
    """What the build promises (issue 5) on text of another domain than the calibration's."""
    versions = {
        name: open_version(example / f"support-{name}" / "1", verify=False) for name in ("fp16", "int8", "int4")
    }
    sizes = {name: sum(file.bytes for file in version.manifest.files) for name, version in versions.items()}
    quality = {name: version.manifest.quality for name, version in versions.items()}
    assert quality["int4"] is not None and quality["int8"] is not None and quality["fp16"] is not None
    assert quality["int4"].tokens >= LEAST_TOKENS
    assert quality["fp16"].perplexity_ratio <= 1.001
    assert quality["fp16"].top1_agreement >= 0.995
    assert quality["int8"].perplexity_ratio <= 1.006
    assert quality["int8"].top1_agreement >= 0.955
    assert sizes["int8"] <= 0.55 * sizes["fp16"]
    assert quality["int4"].perplexity_ratio <= 1.04
    assert quality["int4"].top1_agreement >= 0.87
    assert sizes["int4"] <= 0.425 * sizes["fp16"]
    record = versions["int4"].manifest.quantization
    assert record is not None
    assert record.method == "gptq"
    assert record.calibration is not None
    assert quality["int4"].text != record.calibration.text
    gptq_row = next(row for row in record.candidates if row.method == "gptq")
    others = [row.kl_mean for row in record.candidates if row.kl_mean is not None and not row.chosen]
    assert gptq_row.kl_mean is not None and others
    assert gptq_row.kl_mean < 0.8 * min(other for other in others if other is not None)
