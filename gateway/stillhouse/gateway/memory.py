"""What large bodies took goes back to the system when they are done."""

from __future__ import annotations

import ctypes

# malloc.h of glibc; the values are those that the server's own processes have from their environment (serve).
_PARAMETERS = {-1: 2**20, -3: 4 * 2**20, -8: 4}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX


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
