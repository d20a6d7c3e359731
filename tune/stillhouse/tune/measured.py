"""Evaluation files: what a model will be measured on, read like a source, as the prompts to look for in the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.intake import Rejects
from stillhouse.tune.own_texts import Own
from stillhouse.tune.raw import Bad
from stillhouse.tune.readers import read_source
from stillhouse.tune.records import BadRecord, Mapping, Record, prompt_of
from stillhouse.tune.signatures import plain
from stillhouse.tune.source_files import label_of

# Fewer words stand in many texts: such a prompt is only found as a whole one.
WORDS = 3
LONG_WORDS = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """A record of an evaluation file, of which only the prompt matters, and where it stands."""

    record: Record
    place: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text that gives an evaluation away, and where it stands; `anywhere`: also within another text, or nearly."""

    text: str
    place: dict[str, Any]
    anywhere: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What all evaluation files ask, and the card's line of each: its path, records, and how many were rejected."""

    asked: list[Asked]
    files: list[dict[str, Any]]


def read_measured(recipe: DataRecipe, rejects: Path) -> Measured:
    """What every evaluation file asks; records that ask nothing are written into `rejects`.

    Raises StillhouseError where a file has no prompt at all, or is not there.
    """
    asked: list[Asked] = []
    files = []
    with rejects.open("a", encoding="utf-8") as stream:
        for source in recipe.contamination.against:
            rejected = Rejects(stream, recipe.folder)
            label, mapping = label_of(source.path, recipe.folder), Mapping(source)
            before, records = len(asked), 0
            for place, raw in read_source(source):
                records += 1
                try:
                    if isinstance(raw, Bad):
                        raise BadRecord(raw.reason)
                    at = {"file": label_of(place.file, recipe.folder), place.unit: place.line}
                    asked.append(Asked(mapping.asked(raw), at))
                except BadRecord as bad:
                    rejected.add(place, str(bad))
            if len(asked) == before:
                raise StillhouseError(
                    f"contamination.against: {label} has no prompt: {rejected.first[0] if records else 'no record'}",
                    hint='say which column it is: against = [{ path = "…", columns = { instruction = "…" } }]',
                )
            files.append({"path": label, "records": records, "rejected": records - (len(asked) - before)})
    return Measured(asked, files)


def prompts_of(asked: list[Asked], own: Own) -> list[Prompt]:
    """The prompts to look for, each text once."""
    found: dict[str, Prompt] = {}
    for one in asked:
        for text, anywhere in _forms(one.record, own):
            key = plain(text)
            if key and (key not in found or (anywhere and not found[key].anywhere)):
                found[key] = Prompt(text, one.place, anywhere)
    return list(found.values())


def _forms(record: Record, own: Own) -> Iterator[tuple[str, bool]]:
    """What is asked, all that stands before the answer, and a last turn or an input, which may ask nothing alone."""
    whole, question = prompt_of(record), own.question(record)
    yield whole, whole == question
    if _words(question) >= WORDS:
        yield question, True
    if "messages" in record:
        last = [turn["content"] for turn in record["messages"] if turn["role"] == "user"][-1]
    else:
        last = record["input"]
    if _words(last) >= WORDS:
        yield last, _words(last) >= LONG_WORDS


def _words(text: str) -> int:
    return len(plain(text).split())
