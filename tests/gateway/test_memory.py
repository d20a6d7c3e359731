"""That the C library is told what to do with freed memory; what it spares, benchmarks/hostile.py measures."""

from __future__ import annotations

import platform

from stillhouse.gateway.memory import give_memory_back


def test_glibc_takes_all_of_it_and_another_library_does_no_harm() -> None:
    assert give_memory_back() is (platform.libc_ver()[0] == "glibc")
