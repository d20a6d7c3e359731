"""What every reader gives out, raw records and bad ones with their places, and how a file's text is decoded."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import Source

_MARKS = (  # UTF-32's begin as UTF-16's do
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands: a file and its line, or its row in a table (both from 1)."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.unit == "line" else f"{self.file}, {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Bad:
    """A record that could not be read, and why."""

    reason: str


Raw = tuple[Place, dict[str, Any] | Bad]


def encoding_of(file: Path, source: Source) -> str:
    """The recipe's encoding, or the one that the file's first bytes say."""
    with file.open("rb") as stream:
        start = stream.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), source.encoding)


def whole_text_of(file: Path, encoding: str) -> str:
    """The whole file. Raises StillhouseError that names the line which is not in `encoding`."""
    try:
        return file.read_text(encoding)
    except UnicodeError as error:
        raise undecodable(file, encoding, error) from None


def undecodable(file: Path, encoding: str, error: UnicodeError) -> StillhouseError:
    what, line = str(error), ""
    if isinstance(error, UnicodeDecodeError):
        data = file.read_bytes()
        bad = next((n for n, one in enumerate(data.split(b"\n"), 1) if not _decodes(one, encoding)), None)
        what, line = f"byte 0x{error.object[error.start]:02x}", f" in line {bad}" if bad else ""
    return StillhouseError(
        f"{file} is not {encoding}: {what}{line}", hint='say what it is, e.g. encoding = "cp1252", under [[sources]]'
    )


def why_not_json(error: ValueError | RecursionError) -> str:
    """Why JSON could not be read, in a few words; beside bad grammar, json has limits of its own."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at " + (f"line {error.lineno}, " if error.lineno > 1 else "") + f"column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True
