"""Likely pairs among texts on disk: found in a large crowd of texts that are half alike, and joined into groups."""

from __future__ import annotations

import random
from pathlib import Path
from unittest.mock import patch

import numpy as np

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.joining import Groups, join_alike
from stillhouse.tune.signatures import jaccard, shingles
from stillhouse.tune.sketches import Sketches


def _words(count: int, dice: random.Random) -> str:
    return " ".join("".join(dice.choices("abcdefghijklmnoprstuvw", k=6)) for _ in range(count))


def _templated(count: int) -> list[str]:
    """Texts of which two thirds are the same in all; the last fifty are copies of others with one word more."""
    dice = random.Random(3)
    form = _words(36, dice)
    texts = [f"{form} {_words(14, dice)}" for _ in range(count)]
    return texts + [f"{text} {_words(1, dice)}" for text in texts[:50]]


def test_similarities_are_those_of_the_texts(tmp_path: Path) -> None:
    texts = _templated(3)
    sketches = Sketches(enumerate(texts), Duplicates(), tmp_path / "t")
    for one in range(6):
        for other in range(6):
            exact = jaccard(shingles(texts[one], 5), shingles(texts[other], 5))
            assert sketches.similarity(one, other) == exact
    assert len(Sketches([], Duplicates(), tmp_path / "none").alike(0.8)) == 0


def test_copies_are_found_among_many_that_are_half_alike(tmp_path: Path) -> None:
    texts = _templated(2000)
    sketches = Sketches(enumerate(texts), Duplicates(permutations=64), tmp_path / "t")
    assert 0.45 < sketches.similarity(0, 1) < 0.75
    pairs = set(map(tuple, sketches.alike(0.8).tolist()))
    assert sum((at, 2000 + at) in pairs for at in range(50)) >= 49
    assert len(pairs) < 40 * len(texts)


def test_what_is_joined_is_not_compared_again(tmp_path: Path) -> None:
    texts = _templated(400)
    sketches = Sketches(enumerate(texts), Duplicates(), tmp_path / "t")
    groups = Groups(len(texts))
    with patch.object(Sketches, "similarity", autospec=True, side_effect=Sketches.similarity) as compared:
        join_alike(groups, sketches, 0.5, lambda number: number != 7)
    assert set(groups.roots()) == {0, 7}
    assert compared.call_count < 3 * len(texts)


def test_groups_are_called_by_their_lowest_number() -> None:
    groups = Groups(6)
    for pair in ((5, 4), (2, 4), (0, 1)):
        groups.join(*pair)
    assert groups.roots() == [0, 0, 2, 3, 2, 2]
    assert np.unique(groups.roots()).tolist() == [0, 2, 3]
