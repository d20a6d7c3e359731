"""Weights in blocks: integers with a scale and a zero point for each block of a row, as MatMulNBits keeps them.

A weight is (N, K): N outputs, K inputs. A block is `block_size` neighbours of one row; the last one may be shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Bits = int  # 4 or 8
AT_ONCE = 2**24  # weights that are rounded at a time: what is made of them on the way takes several times their bytes


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A quantized weight: `(integers − zeros) × scales` is what a kernel computes with.

    `integers` (N, K) uint8 below 2**bits; `scales` (N, G) float16; `zeros` (N, G) uint8, or None where it is symmetric
    about 2**(bits − 1). G is the number of blocks of a row.
    """

    integers: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    bits: Bits
    block_size: int

    def dequantized(self) -> NDArray[np.float32]:
        """The weight (N, K) that a kernel computes with."""
        columns = self.integers.shape[1]
        zeros: Any = 2 ** (self.bits - 1)
        if self.zeros is not None:
            zeros = np.repeat(self.zeros, self.block_size, 1)[:, :columns].astype(np.float32)
        scales = np.repeat(self.scales.astype(np.float32), self.block_size, 1)[:, :columns]
        weight: NDArray[np.float32] = (self.integers.astype(np.float32) - zeros) * scales
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        rows, columns = self.integers.shape
        return bytes_of(rows, columns, self.bits, self.block_size, symmetric=self.zeros is None)


def bytes_of(rows: int, columns: int, bits: Bits, block_size: int, *, symmetric: bool) -> int:
    """Bytes of a weight (rows, columns) in the file: integers, half-precision scales, zero points."""
    blocks = -(-columns // block_size)
    zeros = 0 if symmetric else -(-blocks * bits // 8)
    return rows * (blocks * block_size * bits // 8 + 2 * blocks + zeros)


def stack(parts: list[BlockWeight]) -> BlockWeight:
    """One weight from several over the same inputs, row upon row (a fused projection)."""
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = None if first.zeros is None else np.concatenate([part.zeros for part in parts if part.zeros is not None])
    return BlockWeight(
        np.concatenate([part.integers for part in parts]),
        np.concatenate([part.scales for part in parts]),
        zeros,
        first.bits,
        first.block_size,
    )


def grouped(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """(N, K) as (N, G, block_size); a short last block repeats its last column, which moves neither end of a range."""
    import torch

    missing = -weight.shape[1] % block_size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.reshape(len(weight), -1, block_size)


def ungrouped(blocks: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `grouped`."""
    return blocks.reshape(len(blocks), -1)[:, :columns]


def kept_scale(scale: torch.Tensor) -> torch.Tensor:
    """`scale` as the file keeps it, in half precision; 1 where it would vanish (a block of zeros)."""
    import torch

    kept = scale.half().float()
    return torch.where(kept > 0, kept, torch.ones_like(kept))
