"""Rounding does what it says: GPTQ beats rounding to nearest, and is refused where it does nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.build import calibrated, rounding
from stillhouse.build.blocks import BlockWeight, bytes_of
from stillhouse.build.calibrated import gptq_layers
from stillhouse.build.gptq import gptq, hessian_of, output_error
from stillhouse.build.rounding import ROUNDINGS, rounded
from stillhouse.build.stream import LayerStream
from stillhouse.engine.errors import StillhouseError

LINEARS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")


def nothing(_: float) -> None:
    """Nobody is told how far it is."""


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
    monkeypatch.setattr(rounding, "AT_ONCE", 700)  # seven rows
    parts = rounded(weight, "rtn", **form)
    assert np.array_equal(parts.integers, whole.integers)
    assert np.array_equal(parts.scales, whole.scales)


def test_bytes_are_counted_as_the_file_has_them() -> None:
    assert bytes_of(2, 64, 4, 32, symmetric=True) == 2 * (32 + 4)
    assert bytes_of(2, 64, 4, 32, symmetric=False) == 2 * (32 + 4 + 1)
    assert bytes_of(1, 96, 4, 32, symmetric=False) == 48 + 6 + 2
    assert bytes_of(1, 64, 8, 32, symmetric=False) == 64 + 4 + 2


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
