"""A base that came in 4 bits keeps its integers to the bit; what cannot be taken over is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.build import pipeline
from stillhouse.build.auto import refuse_to_widen
from stillhouse.build.blocks import BlockWeight
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.nbits import HEAD, read_quantized
from stillhouse.build.plan import plan
from stillhouse.build.prequantized import TAKEN, block_weight, taken, unpack
from stillhouse.build.recipe import load_recipe
from stillhouse.build.rounding import rounded
from stillhouse.engine.errors import StillhouseError

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def words(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """(…, M) 4-bit integers as (…, M/8) int32, the first in the lowest bits."""
    eights = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    packed = (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return torch.from_numpy(packed.view(np.int32).copy())


def write_gptq(
    base: Path, folder: Path, *, group: int = 32, v2: bool = False, **settings: Any
) -> dict[str, BlockWeight]:
    """`base` in auto-gptq's layout, and what each of its linears was rounded to."""
    shutil.copytree(base, folder)
    tensors = load_file(str(base / "model.safetensors"))
    chosen = {}
    for name in [f"model.layers.{index}.{own}" for index in range(2) for own in NAMES]:
        weight = rounded(tensors.pop(f"{name}.weight"), "rtn", bits=4, block_size=group)
        assert weight.zeros is not None
        chosen[name] = weight
        stored = weight.zeros if v2 else (weight.zeros - 1) & 15
        tensors |= {
            f"{name}.qweight": words(weight.integers).T.contiguous(),
            f"{name}.qzeros": words(stored.T),
            f"{name}.scales": torch.from_numpy(weight.scales.T.copy()),
            f"{name}.g_idx": torch.arange(weight.integers.shape[1], dtype=torch.int32) // group,
            f"{name}.bias": torch.zeros(len(weight.integers)),
        }
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    } | settings  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return chosen


@pytest.mark.slow
@pytest.mark.usefixtures("kept_cache")
@pytest.mark.parametrize(("group", "v2"), [(32, False), (128, True)])
def test_a_gptq_base_keeps_its_integers_to_the_bit(
    group: int, v2: bool, tiny_base: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = write_gptq(tiny_base, tmp_path / "gptq", group=group, v2=v2)
    recipe = write_recipe(base=tmp_path / "gptq", precisions='"int4"', more="[gate.int4]\nperplexity_ratio = 2.0\n")
    result = pipeline.build(load_recipe(recipe), tmp_path / "out")
    version = result.results[0]
    assert version.status == "published", version.reason
    assert version.path is not None
    written = read_quantized(version.path)
    for index in range(2):
        stem, nodes = f"model.layers.{index}", f"/model/layers.{index}"
        attention = [chosen[f"{stem}.{name}"].dequantized() for name in NAMES[:3]]
        assert np.array_equal(written[f"{nodes}/attn/qkv_proj/MatMul"].dequantized(), np.concatenate(attention))
        for name in NAMES[3:]:
            node = f"{nodes}/{name.replace('self_attn', 'attn').replace('.', '/')}/MatMul"
            assert np.array_equal(written[node].dequantized(), chosen[f"{stem}.{name}"].dequantized()), name
    manifest = json.loads((version.path / "manifest.json").read_text())
    record = manifest["quantization"]
    assert (record["method"], record["block_size"], record["int8_weights"]) == ("taken", group, [HEAD])
    assert sum(file["bytes"] for file in manifest["files"]) <= record["budget_bytes"]


@pytest.mark.parametrize(
    ("settings", "words_"),
    [
        ({"desc_act": True}, "desc_act"),
        ({"quant_method": "awq"}, "quantized by awq"),
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes"),
        ({"bits": 8}, "quantized to 8 bits"),
        ({"group_size": -1}, "in groups of -1"),
        ({"checkpoint_format": "marlin"}, "in the format marlin"),
        ({"checkpoint_format": None, "format": "marlin"}, "in the format marlin"),
        ({"dynamic": {"-:.*down_proj.*": {}}}, "in different ways"),
        ({"pack_dtype": "int16"}, "packed into int16"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(
    settings: dict[str, Any], words_: str, tiny_base: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    write_gptq(tiny_base, tmp_path / "gptq", **settings)
    with pytest.raises(StillhouseError, match=words_):
        plan(load_recipe(write_recipe(base=tmp_path / "gptq")), tmp_path / "out")


def test_scattered_groups_are_refused_though_the_config_is_silent(tiny_base: Path, tmp_path: Path) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(str(file))
    tensors["model.layers.0.mlp.up_proj.g_idx"] = tensors["model.layers.0.mlp.up_proj.g_idx"].flip(0)
    save_file(tensors, str(file), {"format": "pt"})
    with pytest.raises(StillhouseError, match=r"layers\.0\.mlp\.up_proj has its inputs' groups scattered"):
        unpack(lambda _: None, base=str(tmp_path / "gptq"), destination=str(tmp_path / "whole"))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(part: str, tiny_base: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    file = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(str(file))
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, str(file), {"format": "pt"})
    with pytest.raises(StillhouseError, match=rf"layers\.1\.mlp\.up_proj\.{part} is missing"):
        plan(load_recipe(write_recipe(base=tmp_path / "gptq")), tmp_path / "out")


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_the_second_format_keeps_its_zero_points_under_either_key(key: str) -> None:
    weight = rounded(torch.randn(8, 64), "rtn", bits=4, block_size=32)
    assert weight.zeros is not None
    parts = {
        ".qweight": words(weight.integers).T.contiguous(),
        ".qzeros": words(weight.zeros.T),
        ".scales": torch.from_numpy(weight.scales.T.copy()),
    }
    read = block_weight("a", parts, {"group_size": 32, "checkpoint_format": None} | {key: "gptq_v2"})
    assert np.array_equal(read.dequantized(), weight.dequantized())


def test_a_fused_projection_is_taken_whole_or_refused_and_nothing_taken_is_widened(
    tiny_base: Path, tmp_path: Path
) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    unpack(lambda _: None, base=str(tmp_path / "gptq"), destination=str(tmp_path / "whole"))
    node = "/model/layers.0/attn/qkv_proj/MatMul"
    own = taken(tmp_path / "whole", [node, HEAD])
    assert own.keys() == {node}
    with pytest.raises(
        StillhouseError, match=r"'qkv_proj' names /model/layers\.0/attn/qkv_proj/MatMul, which the base"
    ):
        refuse_to_widen(own, {node: own[node].integers.shape, HEAD: (1024, 128)}, ["qkv_proj"])
    refuse_to_widen(own, {node: own[node].integers.shape, HEAD: (1024, 128)}, ["lm_head"])
    with pytest.raises(StillhouseError, match=r"'lm_head' names /lm_head/MatMul, which the base"):
        refuse_to_widen(own | {HEAD: own[node]}, {HEAD: (1024, 128)}, ["lm_head"])
    integers = load_file(str(tmp_path / "whole" / TAKEN))
    left = {name: tensor for name, tensor in integers.items() if "layers.0.self_attn.v_proj" not in name}
    assert len(left) == len(integers) - 3
    save_file(left, str(tmp_path / "whole" / TAKEN))
    with pytest.raises(StillhouseError, match=r"q_proj is quantized, .*v_proj is not"):
        taken(tmp_path / "whole", [node])


def test_an_adapter_is_not_merged_into_integers(
    tiny_base: Path, tiny_adapter: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    with pytest.raises(StillhouseError, match="cannot be merged into 4-bit integers"):
        plan(load_recipe(write_recipe(tiny_adapter, base=tmp_path / "gptq")), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "words_"),
    [
        ("model.embed_tokens.weight", float("nan"), r"has NaN in model\.embed_tokens\.weight"),
        ("model.layers.0.mlp.up_proj.scales", float("inf"), r"has (NaN|inf) in model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
)
def test_a_weight_that_is_no_number_is_refused(
    name: str, value: float, words_: str, tiny_base: Path, tmp_path: Path
) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    change(tmp_path / "gptq", lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    with pytest.raises(StillhouseError, match=words_):
        unpack(lambda _: None, base=str(tmp_path / "gptq"), destination=str(tmp_path / "whole"))


def test_a_shape_that_does_not_fit_and_a_module_without_a_place_are_named(tiny_base: Path, tmp_path: Path) -> None:
    write_gptq(tiny_base, tmp_path / "gptq")
    config = tmp_path / "gptq" / "config.json"
    sound = config.read_text()
    config.write_text(json.dumps(json.loads(sound) | {"intermediate_size": 320}))
    with pytest.raises(
        StillhouseError, match=r"down_proj\.weight as \[128, 256\], its config.json makes it \[128, 320\]"
    ):
        unpack(lambda _: None, base=str(tmp_path / "gptq"), destination=str(tmp_path / "whole"))
    config.write_text(sound)
    parts = ("qweight", "qzeros", "scales")
    stem = "model.layers.0.mlp"
    change(tmp_path / "gptq", lambda ts: ts.update({f"{stem}.x.{p}": ts[f"{stem}.up_proj.{p}"].clone() for p in parts}))
    with pytest.raises(StillhouseError, match=r"layers\.0\.mlp\.x\.weight has no place in a LlamaForCausalLM"):
        unpack(lambda _: None, base=str(tmp_path / "gptq"), destination=str(tmp_path / "whole"))


def test_a_checkpoint_that_says_it_in_a_file_of_its_own_is_taken_over(
    tiny_base: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """As auto-gptq wrote them before transformers could read them."""
    folder = tmp_path / "gptq"
    chosen = write_gptq(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert plan(load_recipe(write_recipe(base=folder)), tmp_path / "out").base.quantized
    unpack(lambda _: None, base=str(folder), destination=str(tmp_path / "whole"))
    written = load_file(str(tmp_path / "whole" / "model.safetensors"))
    assert all(np.array_equal(written[f"{name}.weight"].numpy(), own.dequantized()) for name, own in chosen.items())
    (folder / "quantize_config.json").write_text(json.dumps(settings | {"is_marlin_format": True}))
    with pytest.raises(StillhouseError, match="in the format marlin"):
        plan(load_recipe(write_recipe(base=folder)), tmp_path / "out")


def test_such_a_file_beside_an_unquantized_checkpoint_means_nothing(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "plain"))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 8}))
    assert not open_checkpoint(str(folder)).quantized


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the checkpoint's tensors in place."""
    tensors = load_file(str(folder / "model.safetensors"))
    edit(tensors)
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
