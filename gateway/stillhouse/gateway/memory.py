"""What large bodies took goes back to the system when they are done."""

from __future__ import annotations

import asyncio
import ctypes

from stillhouse.engine.resident import trim_heap

# malloc.h of glibc; the values are those that the server's own processes have from their environment (serve).
_PARAMETERS = {-1: 2**20, -3: 4 * 2**20, -8: 4}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX

_TRIM_AFTER_S = 1.0
_due = set[asyncio.AbstractEventLoop]()


def give_memory_back() -> bool:
    """Has glibc map what is large alone, and keep little of what is freed; for the life of this process.

    By itself it keeps freed memory for each of many threads, and more the larger the largest body was: mallopt(3).
    Returns whether the C library took it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library has no such call
        return False
    return all(mallopt(parameter, value) for parameter, value in _PARAMETERS.items())


def trim_soon() -> None:
    """Gives back, in a moment and on a thread, what was freed in pieces between others; on the event loop alone.

    After many large bodies that is as much again as what is in use (80 MB, measured).
    """
    loop = asyncio.get_running_loop()
    if loop in _due:
        return

    def trim() -> None:
        _due.discard(loop)
        loop.run_in_executor(None, trim_heap)

    _due.add(loop)
    loop.call_later(_TRIM_AFTER_S, trim)
