"""Which GPUs the kernels in a CUDA library were compiled for, read from the library itself; no CUDA tool is needed.

A library carries its kernels in containers ("fatbins") of entries: machine code for one compute capability, or PTX
that the driver compiles for any that is not older. The layout is that of cuda-fatbin-decompression's public notes.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEAD = struct.Struct("<IHHQ")  # magic, version, bytes of this head, bytes of the entries behind it
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, –, bytes of this head, bytes behind it, –, –, minor, major, architecture
_PTX, _CODE = 1, 2
_LARGEST_ARCHITECTURE = 200


@dataclass(frozen=True, slots=True)
class Kernels:
    """Compute capabilities (87 for sm_87) of the machine code and of the PTX in a library."""

    code: frozenset[int]
    ptx: frozenset[int]

    def fit(self, architecture: int) -> bool:
        """Whether they run on that GPU. Code of a desktop's GPU does not run on a Tegra's, though both are 8.x."""
        return architecture in self.code or any(oldest <= architecture for oldest in self.ptx)


def kernels_of(library: Path) -> Kernels:
    """Raises OSError for a file that cannot be read; one without kernels has none."""
    found: dict[int, set[int]] = {_PTX: set(), _CODE: set()}
    with library.open("rb") as stream:
        if library.stat().st_size == 0:
            return Kernels(frozenset(), frozenset())
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = content.find(_MAGIC)
            while at >= 0:
                for kind, architecture in _entries(content, at):
                    found[kind].add(architecture)
                at = content.find(_MAGIC, at + len(_MAGIC))
    return Kernels(frozenset(found[_CODE]), frozenset(found[_PTX]))


def _entries(content: mmap.mmap, at: int) -> list[tuple[int, int]]:
    """(kind, architecture) of the entries of the container at `at`; what makes no sense ends it."""
    if at + _HEAD.size > len(content):
        return []
    _, _, head_bytes, entries_bytes = _HEAD.unpack_from(content, at)
    at += head_bytes
    end, entries = min(at + entries_bytes, len(content)), []
    while at + _ENTRY.size <= end:
        kind, _, head_bytes, body_bytes, _, _, _, _, architecture = _ENTRY.unpack_from(content, at)
        if kind not in (_PTX, _CODE) or head_bytes < _ENTRY.size or not 0 < architecture < _LARGEST_ARCHITECTURE:
            break
        entries.append((kind, architecture))
        at += head_bytes + body_bytes
    return entries
