"""A safetensors header is read as the format has it, and whatever else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.tensors import read_header
from stillhouse.engine.errors import StillhouseError


def write(file: Path, header: str, data: bytes = bytes(24)) -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return file


def two(first: list[Any], second: list[Any], shape: list[Any] | None = None) -> str:
    """The header of two tensors of three floats, at these offsets."""
    places = {"a": first, "b": second}
    return json.dumps(
        {name: {"dtype": "F32", "shape": shape or [3], "data_offsets": at} for name, at in places.items()}
    )


def test_tensors_that_lie_one_behind_the_other_are_read(tmp_path: Path) -> None:
    read = read_header(write(tmp_path / "sound.safetensors", two([12, 24], [0, 12])))
    assert {name: (info.dtype, info.shape, info.is_float) for name, info in read.items()} == {
        "a": ("F32", (3,), True),
        "b": ("F32", (3,), True),
    }


@pytest.mark.parametrize(
    ("header", "words"),
    [
        pytest.param("[]", "no JSON object", id="a list"),
        pytest.param("null", "no JSON object", id="null"),
        pytest.param("12", "no JSON object", id="a number"),
        pytest.param('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is not JSON", id="too deep"),
        pytest.param('{"a": 3}', "does not follow the format", id="an entry that is a number"),
        pytest.param(two([0, 12], [0, 12]), "b begins at byte 0 of the data, where", id="on the same bytes"),
        pytest.param(two([0, 12], [6, 18]), "b begins at byte 6 of the data, where", id="overlapping"),
        pytest.param(two([0, 12], [16, 28]), "b begins at byte 16 of the data, where", id="a gap"),
        pytest.param(two([-12, 0], [0, 12]), "does not follow the format", id="negative offsets"),
        pytest.param(two([0.0, 12.0], [12, 24]), "does not follow the format", id="offsets with a point"),
        pytest.param(two([0, 12], [12, 24], [-3, -1]), "does not follow the format", id="a negative shape"),
        pytest.param(two([0, 12], [12, 24], [3.0]), "does not follow the format", id="a shape with a point"),
        pytest.param(two([0, 12], [12, 24], [4]), "a has 12 bytes, its shape [4] does not", id="another size"),
    ],
)
def test_a_header_that_is_none_is_refused(header: str, words: str, tmp_path: Path) -> None:
    file = write(tmp_path / "broken.safetensors", header)
    with pytest.raises(StillhouseError) as refused:
        read_header(file)
    assert str(refused.value).startswith(f"{file} is truncated or broken: ")
    assert words in str(refused.value)
