"""The header of a safetensors file: names, shapes and types, read without loading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))

    @property
    def is_whole_float(self) -> bool:
        """Whether it needs no scale beside it, as floats of 8 bits do."""
        return self.is_float and not self.dtype.startswith("F8")


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of `file` by name (format: https://huggingface.co/docs/safetensors).

    Raises StillhouseError where the file is truncated or no safetensors: the tensors lie one behind the other, without
    a gap and without a byte that two of them share.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if head == b"version ":
            raise StillhouseError(f"{file} is a Git LFS pointer, not the weights", hint="fetch them: git lfs pull")
        if len(head) < 8 or length > size - 8:
            raise _broken(file, f"its header needs {8 + length if len(head) == 8 else 8} bytes, the file has {size}")
        try:
            header: Any = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise _broken(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(file, "its header is no JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, TensorInfo] = {}
    places: list[tuple[int, int, str]] = []
    try:
        for name, entry in header.items():
            start, stop = _whole_numbers(entry["data_offsets"])
            shape = tuple(_whole_numbers(entry["shape"]))
            if stop - start != prod(shape) * _BYTES.get(entry["dtype"], 1) and entry["dtype"] in _BYTES:
                raise _broken(file, f"{name} has {stop - start} bytes, its shape {list(shape)} does not")
            tensors[name] = TensorInfo(entry["dtype"], shape, file)
            places.append((start, stop, name))
    except (KeyError, TypeError, ValueError):
        raise _broken(file, "its header does not follow the format") from None
    end = 0
    for start, stop, name in sorted(places):
        if start != end or stop < start:
            raise _broken(file, f"{name} begins at byte {start} of the data, where the one before it ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise _broken(file, f"its header promises {8 + length + end} bytes, the file has {size}")
    return tensors


def _whole_numbers(values: Any) -> list[int]:
    """`values`, a JSON list of whole numbers from 0 on. Raises ValueError or TypeError where it is none."""
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(values)
    return list(values)


def _broken(file: Path, why: str) -> StillhouseError:
    return StillhouseError(
        f"{file} is truncated or broken: {why}", hint="copy or download it again, and compare its size"
    )
