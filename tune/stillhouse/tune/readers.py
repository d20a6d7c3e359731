"""Raw records out of files: JSONL, JSON, CSV, Parquet and Hugging Face datasets, each with the place it came from.

A record that cannot be read is given out as a `Bad` with its place; a file that cannot be read raises.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.data_recipe import FORMATS, Source

_BY_SUFFIX = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_DELIMITERS = ",;\t|"
_GAP = re.compile(r"[\s,]*")


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


def files_of(source: Source) -> list[Path]:
    """The files that the source's path, folder or glob names, sorted; none for a dataset that is read as one."""
    if form_of(source) == "dataset":
        return sorted(file for file in Path(source.path).rglob("*") if file.is_file()) if _is_local(source) else []
    path = Path(source.path)
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in _BY_SUFFIX]
    else:
        found = [path] if path.is_file() else _globbed(path)
    if source.split:
        found = [file for file in found if file.stem.split("-")[0] == source.split]
    if not found:
        hint = "paths in a recipe are relative to the recipe; a hub id looks like owner/name"
        raise UsageError(f"sources: no such file: {source.path}", hint=hint)
    return [file for file in found if file.is_file()]


def _globbed(pattern: Path) -> list[Path]:
    """The files that an absolute pattern such as /data/**/*.jsonl names, sorted."""
    return sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def form_of(source: Source) -> str:
    """How a source is read; "dataset" is what the datasets library saved, or a hub id."""
    if source.format is not None:
        return source.format
    path = Path(source.path)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return "dataset" if saved else "files"
    if not path.is_absolute():
        return "dataset"
    return _BY_SUFFIX.get(path.suffix.lower(), "files")


def label_of(path: str, folder: str) -> str:
    """What a file is called in cards and lists: its path from `folder`, the recipe's; an id stays one."""
    return os.path.relpath(path, folder) if os.path.isabs(path) else path  # noqa: PTH117  # relative_to has no ..


def read_source(source: Source) -> Iterator[Raw]:
    """Every record of the source in a fixed order. Raises StillhouseError where a file is empty, broken or unknown."""
    if form_of(source) == "dataset":
        from stillhouse.tune.hub_datasets import read_dataset

        yield from read_dataset(source)
        return
    for file in files_of(source):
        yield from read_file(file, source)


def read_file(file: Path, source: Source) -> Iterator[Raw]:
    """Every record of one file, read as its suffix or the source says."""
    form = source.format or _BY_SUFFIX.get(file.suffix.lower())
    if form is None or form == "dataset":
        known = ", ".join(name for name in FORMATS if name != "dataset")
        raise UsageError(f"sources: {file}: unknown kind of file", hint=f'say format = "…", one of {known}')
    if file.stat().st_size == 0:
        raise StillhouseError(f"{file} is empty", hint="is this the right file? leave it out, or write it again")
    reader = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}[form]
    yield from reader(file, source)


def _is_local(source: Source) -> bool:
    return Path(source.path).exists()


def _encoding_of(file: Path, source: Source) -> str:
    """The recipe's encoding, or the one that the file's first bytes say."""
    with file.open("rb") as stream:
        start = stream.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), source.encoding)


def _jsonl(file: Path, source: Source) -> Iterator[Raw]:
    encoding = _encoding_of(file, source)
    for number, line in enumerate(_lines(file, encoding), 1):
        place = Place(str(file), number)
        if isinstance(line, Bad):
            yield place, line
        elif line.strip():
            yield place, _parsed(line)


def _lines(file: Path, encoding: str) -> Iterator[str | Bad]:
    """The lines; one that cannot be decoded spoils no other where a line's end is a byte."""
    if encoding.startswith("utf-16"):
        yield from _whole(file, encoding).split("\n")
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
    except json.JSONDecodeError as error:
        return Bad(f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Bad("is not JSON: nested too deeply")
    return record if isinstance(record, dict) else Bad("is not a JSON object")


def _json(file: Path, source: Source) -> Iterator[Raw]:
    """An array of objects, one object a record (JSONL by another name), or an object that holds the array."""
    text = _whole(file, _encoding_of(file, source)).removeprefix("\ufeff")
    start = _GAP.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
    if text[start : start + 1] == "{":
        try:
            whole, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _not_json(file, error) from None
        if text[end:].strip():
            yield from _jsonl(file, source)
            return
        array = next((key for key, value in whole.items() if isinstance(value, list)), None)
        if array is None or array in ("messages", "conversations"):
            yield Place(str(file), 1), whole
            return
        start = _place_of(array, whole[array], text)
    elif text[start : start + 1] != "[":
        raise StillhouseError(f"{file} is no JSON array of records", hint='[{"instruction": …, "output": …}, …]')
    yield from _array(file, text, start + 1)


def _place_of(key: str, array: list[Any], text: str) -> int:
    """Where in `text` the array begins that is under `key`."""
    for found in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:\s*(?=\[)", text):
        if json.JSONDecoder().raw_decode(text, found.end())[0] == array:
            return found.end()
    return text.index("[")


def _array(file: Path, text: str, at: int) -> Iterator[Raw]:
    """The elements of the array whose first one begins at `at`, each with its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while True:
        at = _GAP.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise _not_json(file, error) from None
        yield Place(str(file), line), record if isinstance(record, dict) else Bad("is not a JSON object")


def _not_json(file: Path, error: json.JSONDecodeError) -> StillhouseError:
    return StillhouseError(
        f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
        hint="is the file whole? a record a line (.jsonl) loses one record by such a fault, not all",
    )


def _whole(file: Path, encoding: str) -> str:
    try:
        return file.read_text(encoding)
    except UnicodeError as error:
        raise _undecodable(file, encoding, error) from None


def _undecodable(file: Path, encoding: str, error: UnicodeError) -> StillhouseError:
    what, line = str(error), ""
    if isinstance(error, UnicodeDecodeError):
        data = file.read_bytes()
        bad = next((n for n, one in enumerate(data.split(b"\n"), 1) if not _decodes(one, encoding)), None)
        what, line = f"byte 0x{error.object[error.start]:02x}", f" in line {bad}" if bad else ""
    return StillhouseError(
        f"{file} is not {encoding}: {what}{line}", hint='say what it is, e.g. encoding = "cp1252", under [[sources]]'
    )


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        line.decode(encoding)
    except UnicodeError:
        return False
    return True


def _csv(file: Path, source: Source) -> Iterator[Raw]:
    encoding = _encoding_of(file, source)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    csv.field_size_limit(sys.maxsize)
    with file.open("r", encoding=encoding, newline="") as stream:
        try:
            yield from _rows(file, stream, source)
        except UnicodeError as error:
            raise _undecodable(file, encoding.removesuffix("-sig"), error) from None


def _rows(file: Path, stream: IO[str], source: Source) -> Iterator[Raw]:
    first = stream.readline()
    stream.seek(0)
    delimiter = source.delimiter or ("\t" if file.suffix == ".tsv" else max(_DELIMITERS, key=first.count))
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not any(header):
        raise StillhouseError(f"{file} has no header", hint="the first line names the columns")
    while True:
        place = Place(str(file), reader.line_num + 1)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield (
                place,
                Bad(f"is not CSV: {error}" + (" (a quote that never closes)" if "end of data" in str(error) else "")),
            )
            continue
        if len(row) == len(header):
            yield place, dict(zip(header, row, strict=True))
        elif any(row):
            yield place, Bad(f"has {len(row)} fields, the header has {len(header)}")


def _parquet(file: Path, source: Source) -> Iterator[Raw]:  # noqa: ARG001
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(file) as table:
            if table.metadata.num_rows == 0:
                raise StillhouseError(f"{file} has no row", hint="is this the right file? leave it out")
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    row += 1
                    yield Place(str(file), row, "row"), record
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StillhouseError(
            f"cannot read {file}: {reason}", hint="is the file whole? copy or write it again"
        ) from None
