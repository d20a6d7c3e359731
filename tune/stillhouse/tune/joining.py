"""Numbers joined into groups, and those of texts that are alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stillhouse.tune.sketches import Sketches


class Groups:
    """Numbers below `count` that are joined into groups (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def root(self, number: int) -> int:
        """The smallest number of its group."""
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> list[int]:
        """The smallest number of each number's group."""
        return [self.root(number) for number in range(len(self._parent))]


def join_alike(
    groups: Groups, texts: Sketches, threshold: float, counts: Callable[[int], bool] = lambda _: True
) -> None:
    """Joins the numbers that count whose texts are at least `threshold` alike; what is joined is not compared again."""
    rows = np.flatnonzero([counts(number) for number in texts.numbers])
    for pairs in texts.neighbours(threshold, rows):
        roots = np.array([groups.root(number) for number in texts.numbers], dtype=np.int64)
        apart = pairs[roots[pairs[:, 0]] != roots[pairs[:, 1]]]
        for one, other in texts.likely(apart, threshold).tolist():
            numbers = texts.numbers[one], texts.numbers[other]
            if groups.root(numbers[0]) != groups.root(numbers[1]) and texts.similarity(one, other) >= threshold:
                groups.join(*numbers)
