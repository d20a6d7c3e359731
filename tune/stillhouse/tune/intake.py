"""Intake: every raw record of every source, mapped, checked, masked and stored; bad ones by file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO, Any

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import DataRecipe, Source
from stillhouse.tune.personal import Masker
from stillhouse.tune.raw import Bad, Place
from stillhouse.tune.readers import read_source
from stillhouse.tune.records import BadRecord, Mapping, Record, masked
from stillhouse.tune.source_files import label_of
from stillhouse.tune.store import Store

Read = dict[str, Counter[str]]
_SHOWN = 3


class Rejects:
    """rejects.jsonl, a JSON object a bad record: file, line (or row) and reason; the first few as phrases."""

    def __init__(self, stream: IO[str], folder: str) -> None:
        self._stream, self._folder = stream, folder
        self.first: list[str] = []

    def add(self, place: Place, reason: str) -> None:
        named = Place(label_of(place.file, self._folder), place.line, place.unit)
        self._stream.write(json.dumps({"file": named.file, place.unit: place.line, "reason": reason}) + "\n")
        if len(self.first) < _SHOWN:
            self.first.append(f"{named} {reason}")


def take_in(recipe: DataRecipe, store: Store, rejects: Path, masker: Masker) -> Read:
    """Fills the store; how many records were read and rejected, by source.

    `rejects` is written on. Raises StillhouseError where a source has no record, or more than the allowed share is bad.
    """
    read: Read = {}
    with rejects.open("a", encoding="utf-8") as stream:
        rejected = Rejects(stream, recipe.folder)
        for source in recipe.sources:
            before = sum(counts["records"] for counts in read.values())
            _read_one(source, recipe, store, masker, read, rejected)
            if sum(counts["records"] for counts in read.values()) == before:
                raise StillhouseError(
                    f"{label_of(source.path, recipe.folder)} has no record", hint="is this the right file?"
                )
    total = sum(counts["records"] for counts in read.values())
    bad = sum(counts["rejected"] for counts in read.values())
    if bad > recipe.checks.max_rejected_share * total or bad == total:
        share = recipe.checks.max_rejected_share
        raise StillhouseError(
            f"{bad} of {total} records are bad, more than checks.max_rejected_share = {share:g}: "
            f"{'; '.join(rejected.first)}",
            hint="all of them are in rejects.jsonl beside the versions; does [[sources]] columns fit?",
        )
    return read


def _read_one(source: Source, recipe: DataRecipe, store: Store, masker: Masker, read: Read, rejects: Rejects) -> None:
    mapping = Mapping(source)
    for place, raw in read_source(source):
        label = label_of(place.file, recipe.folder)
        if label not in read:
            read[label] = Counter()
            if isinstance(raw, dict) and (place.unit == "row" or place.file.endswith((".csv", ".tsv"))):
                mapping.check_columns(label, list(raw))
        read[label]["records"] += 1
        try:
            record = _mapped(raw, mapping, masker)
            store.add(record | {"source": {"file": label, place.unit: place.line}})
        except (BadRecord, RecursionError) as bad:
            read[label]["rejected"] += 1
            rejects.add(place, str(bad) if isinstance(bad, BadRecord) else "is nested too deeply")


def _mapped(raw: dict[str, Any] | Bad, mapping: Mapping, masker: Masker) -> Record:
    if isinstance(raw, Bad):
        raise BadRecord(raw.reason)
    record = mapping.record(raw)
    return masked(record, masker) if masker.kinds else record
