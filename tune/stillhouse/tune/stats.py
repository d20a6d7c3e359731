"""Whether a difference is more than chance: bootstrap intervals and paired tests.

Intervals are percentile bootstraps (Efron & Tibshirani, 1993), of shares Wilson's (1927). Two models on the same
questions are compared pair by pair: right or wrong by McNemar's exact test (1947) and Newcombe's interval (1998, method
10), other figures by a bootstrap over the pairs. Of fewer than LEAST texts or questions nothing is called more than
chance: resampling so few says little, and of a single one nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
LEAST = 10
_CHANCE = 1 - CONFIDENCE  # a p above it may well be chance
_NORMAL = 1.959964  # what a standard normal exceeds in 2.5 % of all cases
_RESAMPLES = 4_000
_SEED = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and the interval that holds it with 95 % confidence; it rests on `count` texts or questions."""

    value: float
    low: float
    high: float
    count: int

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside the interval."""
        return not self.low <= value <= self.high

    def more_than_chance(self, nothing: float) -> bool | None:
        """Whether it differs from `nothing` by more than chance; None where there are too few to tell."""
        return self.excludes(nothing) if self.count >= LEAST else None


def mean(values: Sequence[float]) -> Estimate:
    """The mean of `values` (one at least)."""
    return _estimate(np.asarray(values, float), np.ones(len(values)))


def share(right: Sequence[bool]) -> Estimate:
    """The share of right answers (of one at least) and its Wilson interval, which is never of zero width."""
    count, value = len(right), sum(right) / len(right)
    middle = (value + _NORMAL**2 / (2 * count)) / (1 + _NORMAL**2 / count)
    reach = _NORMAL * math.sqrt(value * (1 - value) / count + (_NORMAL / (2 * count)) ** 2) / (1 + _NORMAL**2 / count)
    # Rounding would leave a bare 0 or 1 by a hair.
    return Estimate(value, max(0.0, min(value, middle - reach)), min(1.0, max(value, middle + reach)), count)


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


def share_difference(after: Sequence[bool], before: Sequence[bool]) -> Estimate:
    """The share of right answers after − before over the same questions, with Newcombe's interval for pairs."""
    now, then = share(after), share(before)
    both = sum(one and other for one, other in zip(after, before, strict=True))
    # phi, with its correction for continuity: how far the two go together, by which both intervals are added.
    together = float(both * now.count - sum(after) * sum(before))
    common = min(together, max(together - now.count / 2, 0.0))
    spread = math.sqrt(math.prod((sum(after), sum(before), now.count - sum(after), now.count - sum(before))))
    phi = common / spread if spread else 0.0
    value = now.value - then.value

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    low = value - reach(now.value - now.low, then.high - then.value)
    high = value + reach(now.high - now.value, then.value - then.low)
    return Estimate(value, low, high, now.count)


def more_right_than_chance(after: Sequence[bool], before: Sequence[bool]) -> bool | None:
    """Whether McNemar's test rejects chance at 5 %; None where there are too few questions to tell."""
    return mcnemar(after, before) < _CHANCE if len(after) >= LEAST else None


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
    return Estimate(float(totals.sum() / weights.sum()), float(low), float(high), len(totals))


def _exp(estimate: Estimate) -> Estimate:
    value, low, high = (math.exp(min(value, 700.0)) for value in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.count)
