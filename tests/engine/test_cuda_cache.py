"""The CUDA slot cache's address arithmetic, on host memory with the CUDA runtime's copy re-enacted.

No device is needed for it, and none is claimed: that cudaMemcpy2D and the CUDA provider do their part is for a
machine that has them.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from stillhouse.engine.cuda_cache import DeviceSlotCache, load_copy_2d
from stillhouse.engine.errors import EngineError

LAYERS, SLOTS, HEADS, MAX_LEN, DIM = 2, 3, 2, 16, 4


class HostTensor:
    def __init__(self) -> None:
        shape = (SLOTS, HEADS, MAX_LEN, DIM)
        self.array = np.random.default_rng(id(self) % 1000).random(shape).astype(np.float16)

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)


def copy_2d(target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int) -> None:
    for row in range(height):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


@pytest.fixture
def cache() -> DeviceSlotCache:
    return DeviceSlotCache(
        slots=SLOTS,
        kv_heads=HEADS,
        max_len=MAX_LEN,
        head_dim=DIM,
        dtype=np.dtype(np.float16),
        tensors=[HostTensor() for _ in range(2 * LAYERS)],
        copy_2d=copy_2d,
    )


def arrays(cache: DeviceSlotCache) -> list[np.ndarray]:
    return [tensor.array for tensor in cache._tensors]  # type: ignore[attr-defined]


def test_a_slot_lies_where_its_address_says(cache: DeviceSlotCache) -> None:
    for tensor, array in enumerate(arrays(cache)):
        for slot in range(SLOTS):
            assert cache.address(tensor, slot) == array[slot].ctypes.data
    assert cache.shape(2) == [2, HEADS, MAX_LEN, DIM]
    assert cache.kv_bytes_per_token == 2 * LAYERS * HEADS * DIM * 2


def test_a_copy_carries_the_tokens_and_nothing_else(cache: DeviceSlotCache) -> None:
    before = [array.copy() for array in arrays(cache)]
    cache.copy(2, 0, 5)
    for array, old in zip(arrays(cache), before, strict=True):
        assert np.array_equal(array[0, :, :5], old[2, :, :5])
        assert np.array_equal(array[0, :, 5:], old[0, :, 5:])
        assert np.array_equal(array[1:], old[1:])


def test_what_is_swapped_out_comes_back_to_the_bit(cache: DeviceSlotCache) -> None:
    before = [array.copy() for array in arrays(cache)]
    swapped = cache.swap_out(1, 7)
    for array in arrays(cache):
        array[1] = 0
    cache.swap_in(2, swapped)
    for array, old in zip(arrays(cache), before, strict=True):
        assert np.array_equal(array[2, :, :7], old[1, :, :7])
        assert np.array_equal(array[2, :, 7:], old[2, :, 7:])


def test_a_missing_cuda_runtime_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(EngineError, match="libcudart"):
        load_copy_2d()
