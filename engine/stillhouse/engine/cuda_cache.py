"""The KV cache on a CUDA device: the same slots as on a CPU, allocated once, copied by the CUDA runtime.

Slots are the plain answer; pages (com.microsoft.PagedAttention) would be another file like this one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import EngineError

# (target, target pitch, source, source pitch, width, height), sizes in bytes: a rectangle from and to any memory.
Copy2D = Callable[[int, int, int, int, int, int], None]


class DeviceTensor(Protocol):
    """What is used of onnxruntime.OrtValue: memory on the device, and where it is."""

    def data_ptr(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SwappedOut:
    """The keys and values of one sequence in host memory: (2 × layers, kv_heads, tokens, head_dim) as bytes."""

    content: NDArray[np.uint8]
    tokens: int


class DeviceSlotCache:
    """Keys and values of all layers, one device tensor each of (slots, kv_heads, max_len, head_dim)."""

    def __init__(
        self,
        *,
        slots: int,
        kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: np.dtype[Any],
        tensors: Sequence[DeviceTensor],
        copy_2d: Copy2D,
    ) -> None:
        self.device = "cuda"
        self.dtype = dtype
        self.max_len = max_len
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._row_bytes = head_dim * dtype.itemsize
        self._slot_bytes = kv_heads * max_len * self._row_bytes
        self.slots = slots
        self.kv_bytes_per_token = len(tensors) * kv_heads * self._row_bytes
        self._tensors = tensors
        self._copy_2d = copy_2d

    @classmethod
    def allocate(
        cls, *, layers: int, slots: int, kv_heads: int, max_len: int, head_dim: int, dtype: np.dtype[Any]
    ) -> DeviceSlotCache:
        """On device 0. Raises EngineError where the CUDA runtime cannot be loaded or memory is short."""
        import onnxruntime as ort

        copy_2d = load_copy_2d()
        shape = [slots, kv_heads, max_len, head_dim]
        try:
            tensors = [ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", 0) for _ in range(2 * layers)]
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise EngineError(
                f"the device has no room for a KV cache of {slots} slots of {max_len} tokens: {error}",
                hint="ask for less: --max-num-seqs, --max-model-len",
            ) from error
        return cls(
            slots=slots,
            kv_heads=kv_heads,
            max_len=max_len,
            head_dim=head_dim,
            dtype=dtype,
            tensors=tensors,
            copy_2d=copy_2d,
        )

    def shape(self, rows: int) -> list[int]:
        """The shape of one tensor bound for `rows` slots: (rows, kv_heads, max_len, head_dim)."""
        return [rows, self._kv_heads, self.max_len, self._head_dim]

    def address(self, tensor: int, slot: int) -> int:
        """Where `slot` of a tensor begins; tensor 2·layer is its key, 2·layer + 1 its value."""
        return self._tensors[tensor].data_ptr() + slot * self._slot_bytes

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of slot `source` to slot `target`, on the device."""
        pitch, width = self.max_len * self._row_bytes, tokens * self._row_bytes
        for tensor in range(len(self._tensors)):
            self._copy_2d(
                self.address(tensor, target), pitch, self.address(tensor, source), pitch, width, self._kv_heads
            )

    def swap_out(self, slot: int, tokens: int) -> SwappedOut:
        """Copies the first `tokens` positions of `slot` to host memory."""
        pitch, width = self.max_len * self._row_bytes, tokens * self._row_bytes
        content = np.empty((len(self._tensors), self._kv_heads, width), np.uint8)
        for tensor in range(len(self._tensors)):
            target = content[tensor].ctypes.data
            self._copy_2d(target, width, self.address(tensor, slot), pitch, width, self._kv_heads)
        return SwappedOut(content, tokens)

    def swap_in(self, slot: int, swapped: SwappedOut) -> None:
        """Brings what was swapped out back, to the bit, into `slot`."""
        pitch, width = self.max_len * self._row_bytes, swapped.tokens * self._row_bytes
        for tensor in range(len(self._tensors)):
            source = swapped.content[tensor].ctypes.data
            self._copy_2d(self.address(tensor, slot), pitch, source, width, width, self._kv_heads)

    def release(self, slot: int) -> None:
        """Nothing to give back: a device's memory is allocated once."""


def load_copy_2d() -> Copy2D:
    """cudaMemcpy2D of the CUDA runtime that ONNX Runtime's CUDA provider has loaded or would load."""
    runtime = None
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            runtime = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if runtime is None:
        raise EngineError(
            "the CUDA runtime (libcudart) cannot be loaded", hint="install CUDA's runtime, or use the CPU"
        )
    function = runtime.cudaMemcpy2D
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int]
    function.restype = ctypes.c_int
    by_address = 4  # cudaMemcpyDefault: the runtime finds out from the addresses

    def copy_2d(target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
        status = function(target, target_pitch, source, source_pitch, width, height, by_address)
        if status != 0:
            raise EngineError(f"cudaMemcpy2D failed with CUDA error {status}")

    return copy_2d
