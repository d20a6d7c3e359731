"""Records of CSV files: a row each, under the names of the header."""

from __future__ import annotations

import csv
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import Source
from stillhouse.tune.raw import Bad, Place, Raw, encoding_of, undecodable

_DELIMITERS = ",;\t|"


def read_csv(file: Path, source: Source) -> Iterator[Raw]:
    """A record a row; one that cannot be read costs the line that it begins in."""
    encoding = encoding_of(file, source)
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    csv.field_size_limit(sys.maxsize)
    with file.open("r", encoding=encoding, newline="") as stream:
        try:
            yield from _rows(file, stream, source)
        except UnicodeError as error:
            raise undecodable(file, encoding.removesuffix("-sig"), error) from None


class _Lines:
    """The lines of a file, of which those of the latest row can be given out once more."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._row: list[str] = []
        self._again: deque[str] = deque()
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._stream)
        self._row.append(line)
        self.number += 1
        return line

    def begin_row(self) -> None:
        self._row.clear()

    def back_to_second(self) -> None:
        """Goes back to the line after the row's first."""
        self.number -= len(self._row) - 1
        self._again.extendleft(reversed(self._row[1:]))


def _rows(file: Path, stream: IO[str], source: Source) -> Iterator[Raw]:
    first = stream.readline()
    stream.seek(0)
    delimiter = source.delimiter or ("\t" if file.suffix == ".tsv" else max(_DELIMITERS, key=first.count))
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header = _header(file, reader)
    while True:
        lines.begin_row()
        place = Place(str(file), lines.number + 1)
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that closes nowhere, or in a later row, must not take the rows between with it.
            lines.back_to_second()
            yield place, Bad(_reason(error))
            continue
        if len(row) == len(header):
            yield place, dict(zip(header, row, strict=True))
        elif any(row):
            yield place, Bad(f"has {len(row)} fields, the header has {len(header)}")


def _header(file: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise StillhouseError(f"{file} has a header that {_reason(error)}", hint="it names the columns") from None
    if not any(header):
        raise StillhouseError(f"{file} has no header", hint="the first line names the columns")
    if twice := next((name for name in header if name and header.count(name) > 1), None):
        raise StillhouseError(f"{file} has two columns called {twice!r}", hint="which is meant? rename one of them")
    return header


def _reason(error: csv.Error) -> str:
    return f"is not CSV: {error}" + (" (a quote that never closes)" if "end of data" in str(error) else "")
