"""That the C library is told what to do with freed memory; what it spares, benchmarks/hostile.py measures."""

from __future__ import annotations

import asyncio
import platform
import threading

import pytest

from stillhouse.gateway import memory
from stillhouse.gateway.memory import give_memory_back, trim_soon


def test_glibc_takes_all_of_it_and_another_library_does_no_harm() -> None:
    assert give_memory_back() is (platform.libc_ver()[0] == "glibc")


async def test_after_large_bodies_the_heap_is_trimmed_once_and_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    trims = list[threading.Thread]()
    monkeypatch.setattr(memory, "_TRIM_AFTER_S", 0.05)
    monkeypatch.setattr(memory, "trim_heap", lambda: trims.append(threading.current_thread()))
    for _ in range(3):
        trim_soon()
    await asyncio.sleep(0.2)
    trim_soon()
    await asyncio.sleep(0.2)
    assert len(trims) == 2
    assert threading.main_thread() not in trims
