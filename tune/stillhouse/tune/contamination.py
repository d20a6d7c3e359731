"""Contamination: what the model will be measured on must not be in what it learns from.

A record is dropped where its prompt is the same as an evaluation's, or alike (Jaccard similarity of shingles); and
where an evaluation's prompt stands in it: a short one as a whole, one of 8 words or more by most of its runs of 8 words
(Brown et al., 2020, appendix C, do it by 13).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stillhouse.tune.data_recipe import DataRecipe
from stillhouse.tune.measured import LONG_WORDS, WORDS, Prompt
from stillhouse.tune.own_texts import SHARED_BY, Own
from stillhouse.tune.records import Record, prompt_of, text_of
from stillhouse.tune.signatures import alike_across, jaccard, plain, shingles, write_signatures
from stillhouse.tune.store import Store

STAGE = "contamination"
_CONTAINED = 0.8


def drop_contaminated(store: Store, prompts: list[Prompt], own: Own, recipe: DataRecipe, folder: Path) -> None:
    """Drops every record that gives an evaluation's prompt away."""
    anywhere = [prompt for prompt in prompts if prompt.anywhere]
    runs = _Runs(anywhere)
    whole = {plain(prompt.text): prompt for prompt in prompts}
    for number, record in store.living():
        same = whole.get(plain(prompt_of(record))) or whole.get(plain(own.question(record)))
        if found := same or runs.first_in(record):
            reason = "asks what the model is measured on" if same else "holds a prompt that the model is measured on"
            store.drop(number, STAGE, reason, same_as=found.place)
    for number, found, similarity in list(_alike(store, anywhere, own, recipe, folder)):
        if store.alive(number):
            reason = f"{similarity:.3f} like a prompt that the model is measured on"
            store.drop(number, STAGE, reason, similarity=round(similarity, 4), same_as=found.place)


class _Runs:
    """Runs of words by which prompts are found in longer texts."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts = prompts
        self._holders: dict[int, list[int]] = {}
        self._lengths: set[int] = set()
        for index, prompt in enumerate(prompts):
            words = plain(prompt.text).split()
            if len(words) >= WORDS:
                self._lengths.add(length := min(len(words), LONG_WORDS))
                for run in _runs(words, length):
                    self._holders.setdefault(run, []).append(index)
        # A run that many prompts share is a form of words, and gives none of them away.
        self._holders = {run: holders for run, holders in self._holders.items() if len(holders) < SHARED_BY}
        counts = Counter(index for holders in self._holders.values() for index in holders)
        self._needed = {index: max(1, round(_CONTAINED * count)) for index, count in counts.items()}

    def first_in(self, record: Record) -> Prompt | None:
        """The first prompt that stands in the record: a long one anywhere, a short one in its prompt."""
        asked, text = plain(prompt_of(record)).split(), plain(text_of(record)).split()
        runs = {
            run
            for length in self._lengths
            for run in _runs(text if length == LONG_WORDS else asked, length)
            if run in self._holders
        }
        hits = Counter(index for run in runs for index in self._holders[run])
        return next((self._prompts[index] for index in sorted(hits) if hits[index] >= self._needed[index]), None)


def _runs(words: list[str], length: int) -> set[int]:
    return {hash(tuple(words[at : at + length])) for at in range(len(words) - length + 1)}


def _alike(
    store: Store, prompts: list[Prompt], own: Own, recipe: DataRecipe, folder: Path
) -> Iterator[tuple[int, Prompt, float]]:
    """Records whose question is at least `threshold` like a prompt, with that prompt and the exact similarity."""
    length, permutations = recipe.duplicates.shingle, recipe.duplicates.permutations
    numbers = [number for number, _ in store.living()]
    questions = (shingles(own.question(record), length) for _, record in store.living())
    ours = write_signatures(questions, folder / "ours.signatures", permutations)
    asked = (shingles(prompt.text, length) for prompt in prompts)
    theirs = write_signatures(asked, folder / "theirs.signatures", permutations)
    for row, other in alike_across(ours, theirs, recipe.contamination.threshold).tolist():
        question = shingles(own.question(store[numbers[row]]), length)
        similarity = jaccard(question, shingles(prompts[other].text, length))
        if similarity >= recipe.contamination.threshold:
            yield numbers[row], prompts[other], similarity
