"""Raw records out of files: JSONL, JSON, CSV, Parquet and Hugging Face datasets, each with the place it came from.

A record that cannot be read is given out as a `Bad` with its place; a file that cannot be read raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.csv_files import read_csv
from stillhouse.tune.data_recipe import FORMATS, Source
from stillhouse.tune.json_files import read_json, read_jsonl
from stillhouse.tune.raw import Place, Raw
from stillhouse.tune.source_files import BY_SUFFIX, files_of, form_of


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
    form = source.format or BY_SUFFIX.get(file.suffix.lower())
    if form not in _READERS:
        known = ", ".join(name for name in FORMATS if name != "dataset")
        raise UsageError(f"sources: {file}: unknown kind of file", hint=f'say format = "…", one of {known}')
    if file.stat().st_size == 0:
        raise StillhouseError(f"{file} is empty", hint="is this the right file? leave it out, or write it again")
    yield from _READERS[form](file, source)


def _read_parquet(file: Path, source: Source) -> Iterator[Raw]:  # noqa: ARG001
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


_READERS: dict[str, Callable[[Path, Source], Iterator[Raw]]] = {
    "jsonl": read_jsonl, "json": read_json, "csv": read_csv, "parquet": _read_parquet,
}  # fmt: skip
