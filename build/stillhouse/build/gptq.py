"""GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323): a weight rounded column by column, the error of each
passed on to the columns that come after, so that the layer's output on the calibration text stays close.

Two choices of ours. The file keeps blocks of neighbouring columns, so the order of activations is kept block-wise:
whole blocks by their mean, columns within a block by their own; a block's scale is set when its turn comes, from
weights that carry all earlier errors. And scales are searched under the very measure that GPTQ minimizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse.build.blocks import AT_ONCE, BlockWeight, kept_scale, stack

DAMPING = 0.01  # of the mean of the Hessian's diagonal
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


def hessian_of(inputs: Tensor) -> Tensor:
    """The mean of x xᵀ (K, K) over inputs (…, K)."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows.T @ rows / len(rows)


def gptq(
    weight: Tensor, hessian: Tensor, *, bits: int, block_size: int, symmetric: bool = False, damping: float = DAMPING
) -> BlockWeight:
    """The weight (N, K) rounded so that its output on inputs with this `hessian` (K, K) changes least."""
    columns = weight.shape[1]
    if weight.numel() > AT_ONCE and len(weight) > 1:  # a head; rows are rounded without regard to each other
        form: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric, "damping": damping}
        parts = weight.split(max(1, AT_ONCE // columns))
        return stack([gptq(part, hessian, **form) for part in parts])
    blocks = _block_order(hessian.diagonal(), block_size)
    order = torch.cat(blocks)
    factor = _inverse_factor(hessian[order][:, order], damping)
    left = weight[:, order].T.contiguous()  # (K, N), what is still to be rounded
    integers = torch.zeros(columns, len(weight), dtype=torch.uint8)
    scales = torch.zeros(len(blocks), len(weight))
    zeros = torch.zeros(len(blocks), len(weight), dtype=torch.uint8)
    start = 0
    for block in blocks:
        stop = start + len(block)
        own = left[start:stop]
        pivots = factor.diagonal()[start:stop]
        scale, zero = search_scale(own, pivots**-2, bits=bits, symmetric=symmetric)
        place = int(block[0]) // block_size
        scales[place], zeros[place] = scale, zero.byte()
        errors = torch.empty_like(own)
        for index in range(len(block)):
            column = own[index]
            rounded = (column / scale + zero).round_().clamp_(0, 2**bits - 1)
            integers[block[index]] = rounded.byte()
            error = column.sub((rounded - zero) * scale).div_(pivots[index])
            own[index + 1 :].addr_(factor[start + index, start + index + 1 : stop], error, alpha=-1)
            errors[index] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return BlockWeight(
        integers.T.contiguous().numpy(),
        scales.T.contiguous().half().numpy(),
        None if symmetric else zeros.T.contiguous().numpy(),
        bits,
        block_size,
    )


def search_scale(columns: Tensor, importance: Tensor, *, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and zero point (N,) of a block (columns, N) with the least error weighted by `importance` (columns,).

    The range is drawn in step by step: a few clipped weights cost less than a coarser grid for all.
    """
    top = 2**bits - 1
    low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        scale = kept_scale((high - low) * (shrink / top))
        zero = (-low * shrink / scale).round_().clamp_(0, top)
        if symmetric:
            zero.fill_(2 ** (bits - 1))
        rounded = (columns / scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale)
        error = importance @ rounded.sub_(columns).square_()
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Mean over the calibration's positions of the squared change of the output, over that of the output itself.

    0 where the output is always 0.
    """
    changed = whole = 0.0
    at_once = max(1, AT_ONCE // weight.shape[1])
    for own, new in zip(weight.split(at_once), rounded.split(at_once), strict=True):
        change = new - own
        changed += float(((change @ hessian) * change).sum())
        whole += float(((own @ hessian) * own).sum())
    return changed / whole if whole > 0 else 0.0


def _block_order(diagonal: Tensor, block_size: int) -> list[Tensor]:
    """The columns of each block, both blocks and columns by falling activation."""
    blocks = list(torch.arange(len(diagonal)).split(block_size))
    means = torch.stack([diagonal[block].mean() for block in blocks])
    ranked = [blocks[int(index)] for index in means.argsort(descending=True, stable=True)]
    return [block[diagonal[block].argsort(descending=True, stable=True)] for block in ranked]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse (K, K)."""
    mean = hessian.diagonal().mean()
    for extra in (1.0, 10.0, 100.0):
        damped = hessian.clone()
        damped.diagonal().add_(damping * extra * mean + 1e-12)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            result: Tensor = factor
            return result
    raise ValueError("the Hessian is not positive definite even when damped")
