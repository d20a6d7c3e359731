"""Rounding without calibration: each method is one row of ROUNDINGS. GPTQ, which needs it, is in gptq.py.

A method gives scales and zero points; integers are rounded under the scales that the file keeps (half precision).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from stillhouse.build.blocks import AT_ONCE, BlockWeight, grouped, kept_scale, stack, ungrouped

_NEAR_THE_CACHE = 2**13  # blocks: three times as fast as all of a weight's at once, to the same bits
Rounding = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def rounded(weight: Tensor, method: str, *, bits: int, block_size: int, symmetric: bool = False) -> BlockWeight:
    """The weight (N, K) in blocks, by the row `method` of ROUNDINGS; symmetric ones know round-to-nearest alone."""
    form: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    by_rows = symmetric or method != "hqq"  # which looks at a weight as a whole
    if by_rows and weight.numel() > AT_ONCE and len(weight) > 1:  # a head
        parts = weight.split(max(1, AT_ONCE // weight.shape[1]))
        return stack([rounded(part, method, **form) for part in parts])
    blocks = grouped(weight, block_size)
    rows, count, _ = blocks.shape
    flat = blocks.reshape(rows * count, block_size)
    scale, zero = _symmetric(flat, bits) if symmetric else ROUNDINGS[method](flat, bits)
    scale = kept_scale(scale)
    integers = (flat / scale[:, None] + zero[:, None]).round_().clamp_(0, 2**bits - 1).byte()
    return BlockWeight(
        ungrouped(integers.reshape(blocks.shape), weight.shape[1]).contiguous().numpy(),
        scale.reshape(rows, count).half().numpy(),
        None if symmetric else zero.reshape(rows, count).byte().numpy(),
        bits,
        block_size,
    )


def _nearest(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid from the least to the greatest weight of each block, with zero on it."""
    top = 2**bits - 1
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    scale = kept_scale((high - low) / top)
    return scale, (-low / scale).round_().clamp_(0, top)


def _symmetric(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The grid about zero that the largest weight of each block fits into."""
    half = 2 ** (bits - 1)
    return flat.abs().amax(1) / (half - 0.5), torch.full((len(flat),), float(half))


def _k_quant(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """llama.cpp's k-quant as ONNX Runtime has it: scale and minimum fitted to large weights first."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fitted = list(pool.map(lambda blocks: _fit_k_quant(blocks, bits), flat.split(_NEAR_THE_CACHE)))
    scales, zeros = zip(*fitted, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _fit_k_quant(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    import numpy as np
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    with np.errstate(divide="ignore", invalid="ignore"):  # a block of equal weights: settled below
        _, scale, zero = quant_tensor_k_quant_cpu(flat.numpy(), bits, flat.shape[1])
    own, least = torch.from_numpy(scale[:, 0]).float(), _nearest(flat, bits)
    sound = own.isfinite() & (own > 0)
    return torch.where(sound, own, least[0]), torch.where(sound, torch.from_numpy(zero[:, 0]).float(), least[1])


def _hqq(flat: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Half-quadratic quantization (Badri and Shaji, 2023) as ONNX Runtime has it, with zero points made whole."""
    from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantizer

    top = 2**bits - 1
    scale, zero = _nearest(flat, bits)
    inverse, fitted = HQQWeightOnlyQuantizer.optimize_weights(flat, 1 / scale[:, None], zero[:, None], [0, top], axis=1)
    return 1 / inverse[:, 0], fitted[:, 0].round().clamp(0, top)


ROUNDINGS: dict[str, Rounding] = {"rtn": _nearest, "k_quant": _k_quant, "hqq": _hqq}
