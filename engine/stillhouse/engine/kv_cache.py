"""The KV cache on a CPU: one slot a sequence, memory by tokens in use.

Address space is reserved for slots × max_len, but a page becomes memory only when a token is written into it, and
goes back to the system when its slot is released: what is resident follows the tokens in use, by the page (4 KiB is
16 tokens of one head of 64 floats), without a page table of our own or a copy.
"""

from __future__ import annotations

import io
import math
import mmap
import tempfile
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class SwappedOut:
    """The keys and values of one sequence in a temporary file, which goes when this goes; on a full disk, in memory."""

    file: IO[bytes]
    tokens: int


class SlotCache:
    """Keys and values of all layers, each (slots, kv_heads, max_len, head_dim), in one anonymous mapping."""

    def __init__(
        self,
        *,
        layers: int,
        slots: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: np.dtype[Any],
    ) -> None:
        self._row_bytes = row_bytes = head_dim * dtype.itemsize
        # Whole pages a head, so that a slot can be given back without touching its neighbours.
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row_bytes)
        self.device = "cpu"
        self.max_len = math.ceil(max_len / step) * step
        self.slots = slots
        self.kv_bytes_per_token = 2 * layers * kv_heads * row_bytes
        self._head_bytes = self.max_len * row_bytes
        self._slot_bytes = kv_heads * self._head_bytes
        self._map = mmap.mmap(
            -1,
            2 * layers * slots * self._slot_bytes,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE,
        )
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        # (2 × layers, slots, kv_heads, max_len, head_dim): key of layer 0, value of layer 0, key of layer 1, …
        self._array: NDArray[np.generic] = np.frombuffer(self._map, dtype=dtype).reshape(
            2 * layers, slots, kv_heads, self.max_len, head_dim
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._array.dtype

    def shape(self, rows: int) -> list[int]:
        """The shape of one tensor bound for `rows` slots: (rows, kv_heads, max_len, head_dim)."""
        return [rows, *self._array.shape[2:]]

    def address(self, tensor: int, slot: int) -> int:
        """Where `slot` of a tensor begins; tensor 2·layer is its key, 2·layer + 1 its value."""
        return int(self._array[tensor, slot].ctypes.data)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of slot `source` to slot `target`; what that held beyond goes back."""
        self._array[:, target, :, :tokens] = self._array[:, source, :, :tokens]
        kept_bytes = math.ceil(tokens * self._row_bytes / mmap.PAGESIZE) * mmap.PAGESIZE
        if kept_bytes == self._head_bytes:
            return
        for tensor in range(self._array.shape[0]):
            start = (tensor * self.slots + target) * self._slot_bytes
            for head in range(start, start + self._slot_bytes, self._head_bytes):
                self._map.madvise(mmap.MADV_DONTNEED, head + kept_bytes, self._head_bytes - kept_bytes)

    def swap_out(self, slot: int, tokens: int) -> SwappedOut:
        """Writes the first `tokens` positions of `slot` to a file without a name: memory that can be reclaimed."""
        part = self._array[:, slot, :, :tokens]
        try:
            file = tempfile.TemporaryFile(prefix="stillhouse-kv-", buffering=0)  # noqa: SIM115  closed by swap_in
            for tensor in part:  # one at a time: memory is what there is none of
                if file.write(tensor.tobytes()) != tensor.nbytes:
                    raise OSError("the disk is full")
        except OSError:
            return SwappedOut(io.BytesIO(part.tobytes()), tokens)
        return SwappedOut(file, tokens)

    def swap_in(self, slot: int, swapped: SwappedOut) -> None:
        """Brings what was swapped out back, to the bit, into `slot`."""
        with swapped.file as file:
            file.seek(0)
            part = self._array[:, slot, :, : swapped.tokens]
            part[...] = np.frombuffer(file.read(), part.dtype).reshape(part.shape)

    def release(self, slot: int) -> None:
        """Gives the pages of `slot` back to the system."""
        for tensor in range(self._array.shape[0]):
            start = (tensor * self.slots + slot) * self._slot_bytes
            self._map.madvise(mmap.MADV_DONTNEED, start, self._slot_bytes)


_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
