"""Whether a difference is more than chance: bootstrap intervals and paired tests.

Intervals are percentile bootstraps (Efron & Tibshirani, 1993); two models on the same questions are compared pair by
pair: right or wrong by McNemar's exact test (1947), other figures by a bootstrap over the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
_RESAMPLES = 4_000
_SEED = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that holds it with 95 % confidence."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high


def mean(values: Sequence[float]) -> Estimate:
    """The mean of `values` (one at least)."""
    return _estimate(np.asarray(values, float), np.ones(len(values)))


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """e to the loss a token; `losses` are sums in nats over the `tokens` of each text, resampled by text."""
    return _exp(_estimate(np.asarray(losses, float), np.asarray(tokens, float)))


def perplexity_ratio(losses: Sequence[float], before: Sequence[float], tokens: Sequence[int]) -> Estimate:
    """The perplexity's ratio to that of `before` on the same texts, resampled by text, both at once."""
    difference = np.asarray(losses, float) - np.asarray(before, float)
    return _exp(_estimate(difference, np.asarray(tokens, float)))


def difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """The mean of after − before over the same questions."""
    return mean((np.asarray(after, float) - np.asarray(before, float)).tolist())


def mcnemar(after: Sequence[bool], before: Sequence[bool]) -> float:
    """McNemar's exact two-sided p: that as many questions were won and lost by chance alone."""
    won = sum(now and not then for now, then in zip(after, before, strict=True))
    lost = sum(then and not now for now, then in zip(after, before, strict=True))
    changed = won + lost
    tail = sum(math.comb(changed, count) for count in range(min(won, lost) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def _estimate(totals: Floats, weights: Floats) -> Estimate:
    """sum(totals) / sum(weights), resampled by their common index."""
    rng = np.random.default_rng(_SEED)
    found = np.empty(_RESAMPLES)
    for start in range(0, _RESAMPLES, 200):
        drawn = rng.integers(0, len(totals), (min(200, _RESAMPLES - start), len(totals)))
        found[start : start + len(drawn)] = totals[drawn].sum(-1) / weights[drawn].sum(-1)
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(totals.sum() / weights.sum()), float(low), float(high))


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(*(math.exp(min(value, 700.0)) for value in (estimate.value, estimate.low, estimate.high)))
