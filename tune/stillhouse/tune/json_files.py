"""Records of JSON files: an object a line, an array of objects, or an object that holds one."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.data_recipe import Source
from stillhouse.tune.raw import Bad, Place, Raw, encoding_of, whole_text_of, why_not_json
from stillhouse.tune.records import Mapping

_GAP = re.compile(r"[\s,]*")


def read_jsonl(file: Path, source: Source) -> Iterator[Raw]:
    """An object a line; one that cannot be read costs one record."""
    encoding = encoding_of(file, source)
    for number, line in enumerate(_lines(file, encoding), 1):
        place = Place(str(file), number)
        if isinstance(line, Bad):
            yield place, line
        elif line.strip():
            yield place, _parsed(line)


def read_json(file: Path, source: Source) -> Iterator[Raw]:
    """An array of objects, one object a record (JSONL by another name), or an object that holds the array."""
    text = whole_text_of(file, encoding_of(file, source)).removeprefix("\ufeff")
    start = _GAP.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    if text[start : start + 1] == "{":
        whole, end = _decoded_at(file, text, start)
        if text[end:].strip():
            yield from read_jsonl(file, source)
            return
        array = None if Mapping(source).is_record(whole) else _array_in(whole, file, source)
        if array is None:
            yield Place(str(file), 1), whole
            return
        start = _place_of(array, whole[array], text)
    elif text[start : start + 1] != "[":
        raise StillhouseError(f"{file} is no JSON array of records", hint='[{"instruction": …, "output": …}, …]')
    yield from _array(file, text, start)


def _lines(file: Path, encoding: str) -> Iterator[str | Bad]:
    """The lines; one that cannot be decoded spoils no other where a line's end is a byte."""
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):
        yield from whole_text_of(file, encoding).split("\n")
        return
    with file.open("rb") as stream:
        for number, line in enumerate(stream):
            yield _decoded(line, "utf-8-sig" if number == 0 and encoding == "utf-8" else encoding)


def _decoded(line: bytes, encoding: str) -> str | Bad:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        return Bad(f"is not {encoding} (byte 0x{error.object[error.start]:02x} at {error.start + 1})")


def _parsed(line: str) -> dict[str, Any] | Bad:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON: {why_not_json(error)}")
    return record if isinstance(record, dict) else Bad("is not a JSON object")


def _array_in(whole: dict[str, Any], file: Path, source: Source) -> str | None:
    """The key of the array of records: the only one, or the one that is called as the source's split."""
    arrays = [key for key, value in whole.items() if isinstance(value, list)]
    arrays = [key for key in arrays if any(isinstance(one, dict) for one in whole[key])] or arrays
    if source.split in arrays:
        return source.split
    if len(arrays) > 1:
        raise UsageError(
            f"sources: {file} has several arrays: {', '.join(arrays)}",
            hint=f'say which: split = "{arrays[0]}"; name the file once more for another',
        )
    return arrays[0] if arrays else None


def _place_of(key: str, array: list[Any], text: str) -> int:
    """Where in `text` the array begins that is under `key`."""
    for found in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:\s*(?=\[)", text):
        if json.JSONDecoder().raw_decode(text, found.end())[0] == array:
            return found.end()
    return text.index("[")


def _array(file: Path, text: str, at: int) -> Iterator[Raw]:
    """The elements of the array that begins at `at`, each with its line."""
    line, counted, at = 1, 0, at + 1
    while True:
        at = _GAP.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        record, at = _decoded_at(file, text, at)
        yield Place(str(file), line), record if isinstance(record, dict) else Bad("is not a JSON object")


def _decoded_at(file: Path, text: str, at: int) -> tuple[Any, int]:
    """The JSON value that begins at `at`, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise StillhouseError(
            f"{file} is not JSON: {why_not_json(error)}",
            hint="is the file whole? a record a line (.jsonl) loses one record by such a fault, not all",
        ) from None
