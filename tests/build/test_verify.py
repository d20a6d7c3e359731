"""The figures are what their formulas say, and a gate holds what it is meant to hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stillhouse.build.texts import LEAST_TOKENS, token_windows
from stillhouse.build.verify import Figures, divergence, judge, log_softmax
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord

GOOD = Figures(
    tokens=8176,
    perplexity=12.0,
    perplexity_ratio=1.01,
    kl_mean=0.01,
    kl_p99=0.1,
    top1_agreement=0.95,
    decode_tokens=384,
    decode_perplexity_ratio=1.01,
    decode_top1_agreement=0.95,
    decode_error=0.005,
)


def test_divergence_is_zero_of_itself_and_what_the_formula_says_of_another() -> None:
    rng = np.random.default_rng(0)
    p, q = (log_softmax(rng.normal(0, 3, (5, 100)).astype(np.float32)) for _ in range(2))
    assert np.exp(p).sum(-1) == pytest.approx(np.ones(5), abs=1e-5)
    assert divergence(p, p) == pytest.approx(np.zeros(5), abs=1e-12)
    exact = (np.exp(p.astype(float)) * (p.astype(float) - q.astype(float))).sum(-1)
    assert divergence(p, q) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "gate", "words"),
    [
        ({}, GateRecord(perplexity_ratio=1.02), None),
        ({}, GateRecord(), None),
        ({"perplexity_ratio": 1.03}, GateRecord(perplexity_ratio=1.02), "perplexity ratio 1.0300 is above 1.02"),
        ({"perplexity_ratio": float("nan")}, GateRecord(perplexity_ratio=1.02), "perplexity ratio nan"),
        ({}, GateRecord(top1_agreement=0.96), "top-1 agreement 0.9500 is below 0.96"),
        # On so few tokens 1.03 may be 1.02, but 1.5 is not.
        ({"decode_perplexity_ratio": 1.03}, GateRecord(perplexity_ratio=1.02), None),
        ({"decode_perplexity_ratio": 1.5}, GateRecord(perplexity_ratio=1.02), "one-token decode's"),
    ],
)
def test_a_gate_holds_prefill_and_decode(change: dict[str, float], gate: GateRecord, words: str | None) -> None:
    reason = judge(replace(GOOD, **change), gate)
    assert reason is None if words is None else words in (reason or "")


def test_windows_cover_at_least_the_tokens_that_a_gate_needs() -> None:
    windows = token_windows(list(range(100_000)), 8192)
    assert sum(len(window) - 1 for window in windows) >= LEAST_TOKENS
    assert {len(window) for window in windows} == {512}
    assert windows[0][0] == 0
    assert windows[-1][-1] == 99_999
    with pytest.raises(StillhouseError, match="has 8000 tokens"):
        token_windows(list(range(8000)), 8192)
