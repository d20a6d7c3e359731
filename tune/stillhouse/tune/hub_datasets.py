"""Datasets that Hugging Face's library saved (`save_to_disk`), and hub ids where there is a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.data_recipe import Source
from stillhouse.tune.raw import Place, Raw


def read_dataset(source: Source) -> Iterator[Raw]:
    """Every row of the source's split; places are rows of it. Raises StillhouseError where it cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    rows = _saved(source) if Path(source.path).exists() else _from_hub(source)
    try:
        for number, record in enumerate(rows, 1):
            yield Place(source.path, number, "row"), dict(record)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise StillhouseError(
            f"cannot read on in the dataset {source.path}: {_line_of(error)}", hint="is it whole? is the hub there?"
        ) from None


def _saved(source: Source) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(source.path)
    except Exception as error:  # pyarrow's, the library's own and the system's, without a common class
        raise StillhouseError(
            f"cannot read the dataset {source.path}: {_line_of(error)}", hint="save it again with save_to_disk"
        ) from None
    return _split_of(found, source)


def _from_hub(source: Source) -> Any:
    import datasets

    try:
        found = datasets.load_dataset(source.path, revision=source.revision, streaming=True)
    except Exception as error:  # the hub's, the network's and the library's own, without a common class
        raise StillhouseError(
            f"{source.path} is not a folder, and the hub does not give it: {_line_of(error)}",
            hint="name a local folder or file, or check the network, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE",
        ) from None
    return _split_of(found, source)


def _split_of(found: Any, source: Source) -> Any:
    if not isinstance(found, dict):  # a DatasetDict is one
        return found
    splits = list(found)
    if source.split is None and len(splits) == 1:
        return found[splits[0]]
    if source.split not in splits:
        asked = f"no split {source.split!r}" if source.split else "several splits"
        raise UsageError(f"sources: {source.path} has {asked}", hint=f'say split = "…", one of {", ".join(splits)}')
    return found[source.split]


def _line_of(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
