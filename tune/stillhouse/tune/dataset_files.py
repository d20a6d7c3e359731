"""The splits of a dataset on disk, JSONL or Parquet, written record by record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stillhouse.engine.directory import sha256_of
from stillhouse.tune.records import Record

_BATCH = 1000
_TEXTS = ("instruction", "input", "output", "label", "group")


def write_split(name: str, records: Iterable[Record], folder: Path, form: str, keep: list[str]) -> dict[str, Any]:
    """Writes one split, synced; its file, records, bytes and sha256. `keep` are the columns carried along."""
    file = folder / f"{name}.{form}"
    count = _parquet(records, file, keep) if form == "parquet" else _jsonl(records, file)
    return {"file": file.name, "records": count, "bytes": file.stat().st_size, "sha256": sha256_of(file)}


def _jsonl(records: Iterable[Record], file: Path) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    return count


def _parquet(records: Iterable[Record], file: Path, keep: list[str]) -> int:
    """One schema for all splits; what is kept of other columns is JSON where it is no text."""
    import pyarrow as pa
    from pyarrow import parquet

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    source = pa.struct([("file", pa.string()), ("line", pa.int64()), ("row", pa.int64())])
    own = {*_TEXTS, "messages", "source", "weight", "oversampled", "synthetic"}
    columns = [(name, pa.string()) for name in (*_TEXTS, *(name for name in keep if name not in own))]
    schema = pa.schema(
        [
            *columns,
            ("messages", pa.list_(message)),
            ("source", source),
            ("weight", pa.float64()),
            ("oversampled", pa.bool_()),
            ("synthetic", pa.string()),
        ]
    )
    count = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for batch in _batched(records):
            rows = [{name: _cell(name, record.get(name)) for name in schema.names} for record in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(batch)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return count


def _cell(name: str, value: Any) -> Any:
    plain = name in ("messages", "source", "weight", "oversampled")
    return value if plain or value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _batched(records: Iterable[Record]) -> Iterator[list[Record]]:
    waiting = iter(records)
    while batch := list(islice(waiting, _BATCH)):
        yield batch
