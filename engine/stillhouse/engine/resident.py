"""What stays in memory of weights: what was read or allocated once, to load or pack them, goes back to the system.

ONNX Runtime reads each weight of the file while it loads (to pack it, or to see that what was packed is its own), and
most of them never again: its kernels read the packed form. Their pages would count as the process's all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

# https://man7.org/linux/man-pages/man2/madvise.2.html
_MADV_DONTNEED = 4
_MADV_PAGEOUT = 21  # Linux 5.4; one that does not know it leaves the pages where they are

_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def released_after(file: Path) -> Iterator[None]:
    """Takes the pages of `file` that the block has mapped and read out of the process's memory when it ends.

    They stay in the system's cache: one that is read again comes back without the disk. What the block maps must
    outlive it: pages are taken from a place in memory, whatever lies there by then. For the same reason a mapping that
    was there before, or was written to (it holds pages of its own), is left alone.
    """
    with _one_at_a_time:
        before = {start for start, _ in _mappings(file)}
        yield
        _advise([each for each in _unwritten_mappings(file) if each[0] not in before], _MADV_DONTNEED)


@contextlib.contextmanager
def paged_out(file: Path, every_s: float = 0.05) -> Iterator[None]:
    """Keeps taking them out while the block runs, so that a file that is read from end to end is never in whole.

    Meanwhile the heap is trimmed, too: constants that were folded leave gaps of hundreds of MB.
    This advice loses nothing, whatever other threads map and unmap meanwhile; but the pages leave the system's cache.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            _advise(_unwritten_mappings(file), _MADV_PAGEOUT)
            trim_heap()

    watcher = threading.Thread(target=watch, name="stillhouse-page-out", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def trim_heap() -> None:
    """Gives back what was freed in pieces: glibc keeps it for the next allocation, hundreds of MB after a packing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _advise(mappings: list[tuple[int, int]], advice: int) -> None:
    madvise = ctypes.CDLL(None).madvise
    for start, length in mappings:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def _mappings(file: Path) -> list[tuple[int, int]]:
    """Start and length of each mapping of `file`; none where there is no /proc."""
    return _found("/proc/self/maps", file, "$")


def _unwritten_mappings(file: Path) -> list[tuple[int, int]]:
    """Of these, the ones that hold the file's pages alone. The kernel counts the whole process's pages to tell."""
    return _found("/proc/self/smaps", file, r"\n(?:[A-Z].*\n)*?Anonymous: +0 kB$")


def _found(table: str, file: Path, rest: str) -> list[tuple[int, int]]:
    """The mappings of `file` in `table` (START-END PERMISSIONS OFFSET DEVICE INODE PATH) whose entry ends in `rest`."""
    try:
        text = Path(table).read_text("utf-8", errors="surrogateescape")
    except OSError:
        return []
    entry = rf"^([0-9a-f]+)-([0-9a-f]+)(?: \S+){{4}} +{re.escape(os.path.realpath(file))}{rest}"
    spans = ((int(start, 16), int(end, 16)) for start, end in re.findall(entry, text, re.MULTILINE))
    return [(start, end - start) for start, end in spans]
