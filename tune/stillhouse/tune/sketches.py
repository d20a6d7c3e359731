"""Texts on disk as what they are compared by: their shingles, and the signatures that say which pairs to look at.

Shingles take about 4 bytes a character of text, signatures 4 bytes a permutation; memory holds two numbers a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.tune import signatures
from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.signatures import Pairs, jaccard, shingles, write_signatures

_MARKED = np.uint32(2**20 - 1)  # of a shingle's hash, the bits by which it is marked


class Sketches:
    """Texts by row, in the order of their rising `numbers`, compared exactly or by their signatures."""

    def __init__(self, texts: Iterable[tuple[int, str]], options: Duplicates, file: Path) -> None:
        self.numbers = array("Q")
        self._marks = np.zeros(_MARKED + 1, dtype=bool)
        self._ends = array("Q", [0])
        shingled = file.with_suffix(".shingles")
        cut = self._written(texts, options.shingle, shingled)
        self.signatures = write_signatures(cut, file.with_suffix(".signatures"), options.permutations)
        empty = np.empty(0, dtype=np.uint32)
        self._shingles = np.asarray(np.memmap(shingled, dtype="<u4", mode="r")) if self.numbers else empty

    def similarity(self, one: int, other: int) -> float:
        """The exact Jaccard similarity of two rows' shingles."""
        return jaccard(self._row(one), self._row(other))

    def alike_to(self, row: int, others: Iterable[int], threshold: float) -> Iterator[tuple[int, float]]:
        """Those of `others` that are at least `threshold` like `row`, each with its exact similarity."""
        own = self._row(row)
        self._marks[own & _MARKED] = True
        try:
            for other in others:
                theirs = self._row(other)
                # Few shingles share a mark: no more are in common than are marked, and hardly fewer.
                most = np.count_nonzero(self._marks[theirs & _MARKED])
                if most < threshold * (len(own) + len(theirs) - most):
                    continue
                if (similarity := jaccard(own, theirs)) >= threshold:
                    yield other, similarity
        finally:
            self._marks[own & _MARKED] = False

    def alike(self, threshold: float) -> Pairs:
        """Pairs (P, 2) of rows i < j that are likely at least `threshold` alike, sorted by j, then i."""
        return signatures.alike(self.signatures, threshold)

    def neighbours(self, threshold: float, rows: NDArray[np.int64]) -> Iterator[Pairs]:
        """Pairs (P, 2) of `rows` that may be `threshold` alike, a band at a time: one pair may come in several."""
        return signatures.by_band(self.signatures, threshold, rows)

    def likely(self, pairs: Pairs, threshold: float) -> Pairs:
        """Those of `pairs` whose signatures are near enough to `threshold`."""
        return signatures.likely(self.signatures, pairs, threshold)

    def _row(self, row: int) -> NDArray[np.uint32]:
        return self._shingles[self._ends[row] : self._ends[row + 1]]

    def _written(self, texts: Iterable[tuple[int, str]], length: int, file: Path) -> Iterator[NDArray[np.uint32]]:
        with file.open("wb") as stream:
            for number, text in texts:
                cut = shingles(text, length)
                stream.write(cut.astype("<u4").tobytes())
                self.numbers.append(number)
                self._ends.append(self._ends[-1] + len(cut))
                yield cut
