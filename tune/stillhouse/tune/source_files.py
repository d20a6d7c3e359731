"""Which files a source names, and how each is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillhouse.engine.errors import UsageError
from stillhouse.tune.data_recipe import Source

BY_SUFFIX = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
# In a folder that `stillhouse data prepare` made, or datasets on the hub have: what holds no records to learn from.
_CARDS = ("dataset.json", "removed.jsonl", "rejects.jsonl")
_HUB_CARDS = ("dataset_infos.json", "dataset_info.json")


def files_of(source: Source, key: str = "sources") -> list[Path]:
    """The files that the source's path, folder or glob names, sorted; none for a dataset that is read as one.

    `split` chooses among several files, by their names. Raises UsageError, with the recipe's `key`, where none is left.
    """
    path = Path(source.path)
    if form_of(source) == "dataset":
        return sorted(file for file in path.rglob("*") if file.is_file()) if path.exists() else []
    if path.is_file():
        return [path]
    found = [file for file in (_in_folder(path) if path.is_dir() else _globbed(path)) if file.is_file()]
    if source.split:
        found = [file for file in found if _is_split(file, source.split)]
    if not found and path.is_dir():
        of_split = f" of the split {source.split!r}" if source.split else ""
        raise UsageError(f"{key}: no file of records{of_split} in {path}", hint=f"read are {', '.join(BY_SUFFIX)}")
    if not found:
        hint = "paths in a recipe are relative to the recipe; a hub id looks like owner/name"
        raise UsageError(f"{key}: no such file: {source.path}", hint=hint)
    return found


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
    return BY_SUFFIX.get(path.suffix.lower(), "files")


def label_of(path: str, folder: str) -> str:
    """What a file is called in cards and lists: its path from `folder`, the recipe's; an id stays one."""
    return os.path.relpath(path, folder) if os.path.isabs(path) else path  # noqa: PTH117  # relative_to has no ..


def _in_folder(folder: Path) -> list[Path]:
    """The files of records at any depth; of an earlier dataset of ours its splits, but for empty ones."""
    found = []
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or file.suffix.lower() not in BY_SUFFIX or file.name in _HUB_CARDS:
            continue
        ours = all((file.parent / name).is_file() for name in _CARDS)
        if not (ours and (file.name in _CARDS or file.stat().st_size == 0)):
            found.append(file)
    return found


def _globbed(pattern: Path) -> list[Path]:
    """The files that an absolute pattern such as /data/**/*.jsonl names, sorted."""
    return sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def _is_split(file: Path, split: str) -> bool:
    """Whether a file is called by the split, as train-00000-of-00001.parquet, or lies in a folder that is."""
    return split in re.split(r"[^A-Za-z0-9]+", file.stem) or file.parent.name == split
