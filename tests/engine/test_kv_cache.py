"""The KV cache's memory follows the tokens in use."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from stillhouse.engine.kv_cache import SlotCache


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text("ascii").split()
    return int(fields[1]) * 4096


def make_cache(slots: int = 8) -> SlotCache:
    return SlotCache(layers=4, slots=slots, kv_heads=2, max_len=4096, head_dim=64, dtype=np.dtype(np.float32))


def test_memory_is_taken_by_tokens_written_and_given_back_at_release() -> None:
    before = resident_bytes()
    cache = make_cache()
    reserved = 8 * 4096 * cache.kv_bytes_per_token
    assert resident_bytes() - before < reserved // 20
    cache._array[:, 3, :, :256] = 1
    used = resident_bytes() - before
    assert 256 * cache.kv_bytes_per_token <= used < 2 * 256 * cache.kv_bytes_per_token
    cache.release(3)
    assert resident_bytes() - before < 256 * cache.kv_bytes_per_token // 4


def test_a_copy_carries_the_tokens() -> None:
    cache = make_cache()
    content = np.random.default_rng(0).random((8, 2, 100, 64), np.float32)
    cache._array[:, 5, :, :100] = content
    cache.copy(5, 1, 100)
    assert np.array_equal(cache._array[:, 1, :, :100], content)


def test_a_shorter_sequence_that_moves_in_leaves_nothing_of_a_longer_one() -> None:
    before = resident_bytes()
    cache = make_cache()
    cache._array[:, 1, :, :4000] = 1
    cache._array[:, 5, :, :100] = 2
    cache.copy(5, 1, 100)
    assert resident_bytes() - before < 3 * 100 * cache.kv_bytes_per_token
    assert (cache._array[:, 1, :, :100] == 2).all()


def test_what_is_swapped_out_comes_back_to_the_bit_and_is_no_memory_meanwhile() -> None:
    cache = make_cache()
    content = np.random.default_rng(0).random((8, 2, 2000, 64), np.float32)
    before = resident_bytes()
    cache._array[:, 5, :, :2000] = content
    swapped = cache.swap_out(5, 2000)
    cache.release(5)
    assert resident_bytes() - before < content.nbytes // 4
    cache.swap_in(2, swapped)
    assert np.array_equal(cache._array[:, 2, :, :2000], content)
    assert swapped.file.closed


def test_on_a_full_disk_what_is_swapped_out_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")  # every write to it fails for want of space
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full.open("wb", buffering=0))
    cache = make_cache()
    content = np.random.default_rng(0).random((8, 2, 300, 64), np.float32)
    cache._array[:, 5, :, :300] = content
    swapped = cache.swap_out(5, 300)
    cache.release(5)
    cache.swap_in(2, swapped)
    assert np.array_equal(cache._array[:, 2, :, :300], content)


def test_a_slot_of_odd_length_keeps_its_neighbours_apart() -> None:
    cache = SlotCache(layers=1, slots=3, kv_heads=3, max_len=33, head_dim=48, dtype=np.dtype(np.float16))
    assert cache.max_len >= 33
    cache._array[:] = 1
    cache.release(1)
    assert cache._array[:, [0, 2]].all()
    assert not cache._array[:, 1].any()
