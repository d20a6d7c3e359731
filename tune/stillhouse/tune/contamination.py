"""Contamination: what the model will be measured on must not be in what it learns from.

A record is dropped where its prompt is alike an evaluation's prompt (Jaccard similarity of shingles), or where an
evaluation's prompt stands in the record's text (its runs of 8 words; Brown et al., 2020, appendix C, do it by 13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.data_recipe import DataRecipe, Source
from stillhouse.tune.duplicates import text_of
from stillhouse.tune.readers import Bad, read_file
from stillhouse.tune.records import prompt_of
from stillhouse.tune.signatures import alike_across, jaccard, plain, shingles, write_signatures
from stillhouse.tune.store import Store

STAGE = "contamination"
# A shorter prompt is only found as a whole: a few words stand in many texts.
WORDS = 8
_CONTAINED = 0.8
_PROMPTS = ("instruction", "prompt", "question", "query", "text")


@dataclass(frozen=True, slots=True)
class Measured:
    """A prompt of an evaluation file and where it stands."""

    prompt: str
    place: dict[str, Any]


def read_measured(recipe: DataRecipe) -> list[Measured]:
    """The prompts of every evaluation file. Raises StillhouseError where one has none."""
    found: list[Measured] = []
    for file in map(Path, recipe.contamination.against):
        if not file.is_file():
            raise UsageError(
                f"contamination.against: no such file: {file}", hint="paths in a recipe are relative to the recipe"
            )
        before = len(found)
        for place, raw in read_file(file, Source(path=str(file))):
            prompt = None if isinstance(raw, Bad) else _prompt(raw)
            if prompt:
                found.append(Measured(prompt, {"file": file.name, place.unit: place.line}))
        if len(found) == before:
            raise StillhouseError(
                f"contamination.against: {file} has no prompt", hint=f"a record has one of {', '.join(_PROMPTS)}"
            )
    return found


def drop_contaminated(store: Store, measured: list[Measured], recipe: DataRecipe, folder: Path) -> None:
    """Drops every record that gives an evaluation's prompt away."""
    runs = _runs_of(measured)
    for number, found in _contained(store, measured, runs):
        store.drop(number, STAGE, "holds a prompt that the model is measured on", same_as=found.place)
    length, permutations = recipe.duplicates.shingle, recipe.duplicates.permutations
    numbers = [number for number, _ in store.living()]
    ours = write_signatures(
        (shingles(prompt_of(record), length) for _, record in store.living()), folder / "ours.u4", permutations
    )
    theirs = write_signatures((shingles(one.prompt, length) for one in measured), folder / "theirs.u4", permutations)
    for row, other in alike_across(ours, theirs, recipe.contamination.threshold):
        number = numbers[row]
        if not store.alive(number):
            continue
        similarity = jaccard(shingles(prompt_of(store[number]), length), shingles(measured[other].prompt, length))
        if similarity >= recipe.contamination.threshold:
            reason = f"{similarity:.3f} like a prompt that the model is measured on"
            store.drop(number, STAGE, reason, similarity=round(similarity, 4), same_as=measured[other].place)


def _contained(store: Store, measured: list[Measured], runs: dict[int, list[int]]) -> Iterator[tuple[int, Measured]]:
    needed = [max(1, round(_CONTAINED * len(set(_word_runs(one.prompt))))) for one in measured]
    for number, record in store.living():
        hits = Counter(index for run in set(_word_runs(text_of(record))) for index in runs.get(run, ()))
        whole = next((index for index, count in sorted(hits.items()) if count >= needed[index]), None)
        if whole is not None:
            yield number, measured[whole]


def _runs_of(measured: list[Measured]) -> dict[int, list[int]]:
    """Which prompts have a run of words."""
    runs: dict[int, list[int]] = {}
    for index, one in enumerate(measured):
        for run in set(_word_runs(one.prompt)):
            runs.setdefault(run, []).append(index)
    return runs


def _word_runs(text: str) -> list[int]:
    words = plain(text).split()
    return [hash(tuple(words[at : at + WORDS])) for at in range(len(words) - WORDS + 1)]


def _prompt(raw: dict[str, Any]) -> str | None:
    """What is asked in a record of whatever form: messages but the last answer, or one of the usual columns."""
    messages = raw.get("messages")
    if isinstance(messages, list):
        turns = [message for message in messages if isinstance(message, dict)]
        asked = [str(message.get("content", "")) for message in turns if message.get("role") == "user"]
        return "\n\n".join(asked) or None
    first = next((str(raw[name]) for name in _PROMPTS if raw.get(name)), "")
    return f"{first}\n\n{raw['input']}" if first and raw.get("input") else first or None
