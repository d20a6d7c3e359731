"""Intake: every raw record of every source, mapped, checked, masked and stored; bad ones by file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import IO

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import DataRecipe, Source
from stillhouse.tune.personal import Masker
from stillhouse.tune.readers import Bad, Place, label_of, read_source
from stillhouse.tune.records import BadRecord, Mapping, with_texts
from stillhouse.tune.store import Store

Read = dict[str, Counter[str]]
_SHOWN = 3


def take_in(recipe: DataRecipe, store: Store, rejects: Path, masker: Masker) -> Read:
    """Fills the store; how many records were read and rejected, by source.

    `rejects` gets a JSON object a bad record: file, line (or row) and reason. Raises StillhouseError where a source
    has no record, or more than the allowed share is bad.
    """
    read: Read = {}
    with rejects.open("w", encoding="utf-8") as stream:
        first: list[str] = []
        for source in recipe.sources:
            before = sum(counts["records"] for counts in read.values())
            _read_one(source, recipe, store, masker, read, stream, first)
            if sum(counts["records"] for counts in read.values()) == before:
                raise StillhouseError(
                    f"{label_of(source.path, recipe.folder)} has no record", hint="is this the right file?"
                )
    total = sum(counts["records"] for counts in read.values())
    bad = sum(counts["rejected"] for counts in read.values())
    if bad > recipe.checks.max_rejected_share * total or bad == total:
        share = recipe.checks.max_rejected_share
        raise StillhouseError(
            f"{bad} of {total} records are bad, more than checks.max_rejected_share = {share:g}: {'; '.join(first)}",
            hint="all of them are in rejects.jsonl beside the versions; does [[sources]] columns fit?",
        )
    return read


def _read_one(
    source: Source, recipe: DataRecipe, store: Store, masker: Masker, read: Read, rejects: IO[str], first: list[str]
) -> None:
    mapping = Mapping(source)
    for place, raw in read_source(source):
        label = label_of(place.file, recipe.folder)
        if label not in read:
            read[label] = Counter()
            if isinstance(raw, dict) and (place.unit == "row" or place.file.endswith((".csv", ".tsv"))):
                mapping.check_columns(label, list(raw))
        read[label]["records"] += 1
        try:
            if isinstance(raw, Bad):
                raise BadRecord(raw.reason)
            record = with_texts(mapping.record(raw), masker)
        except BadRecord as bad:
            read[label]["rejected"] += 1
            named = Place(label, place.line, place.unit)
            rejects.write(json.dumps({"file": label, place.unit: place.line, "reason": str(bad)}) + "\n")
            if len(first) < _SHOWN:
                first.append(f"{named} {bad}")
            continue
        store.add(record | {"source": {"file": label, place.unit: place.line}})
