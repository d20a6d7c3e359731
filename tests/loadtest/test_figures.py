"""Histograms, objectives and tallies: what the figures are made of."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.histogram import Latencies
from stillhouse.loadtest.pieces import AnswerClock, Piece
from stillhouse.loadtest.report import token_table
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.slo import is_good, parse_slo
from stillhouse.loadtest.tally import Summary, Tally, summarize, tally_up


def sample(ttft_s: float | None, e2e_s: float, tokens: int = 11, outcome: str = "ok", **more: Any) -> Sample:
    return Sample("m", 100.0, 100.0 + e2e_s, ttft_s, None if ttft_s is None else e2e_s, tokens, True, outcome, **more)


@given(st.lists(st.floats(1e-5, 7000), min_size=1, max_size=60), st.sampled_from([50, 90, 95, 99]))
def test_a_percentile_is_the_nearest_rank_within_a_thousandth(values_s: list[float], percent: int) -> None:
    (found_ms,) = Latencies(values_s).percentiles_ms([percent])
    ordered = sorted(values_s)
    rank = math.ceil(percent * len(ordered) / 100)
    assert found_ms / 1e3 == pytest.approx(ordered[rank - 1], rel=0.0015, abs=1.5e-6)


def test_a_95th_percentile_is_not_exceeded_by_more_than_5_per_cent() -> None:
    assert Latencies([0.1] * 29 + [0.3] * 2).percentiles_ms([95]) == pytest.approx([300], rel=0.001)


def test_histograms_of_several_workers_are_the_histogram_of_all_their_values() -> None:
    chance = random.Random(1)
    values_s = [chance.lognormvariate(-2, 1) for _ in range(3000)]
    whole, together = Latencies(values_s), Latencies()
    for part in (values_s[:7], values_s[7:1000], values_s[1000:]):
        together.merge(Latencies.from_json(json.loads(json.dumps(Latencies(part).to_json()))))
    assert together.percentiles_ms((50, 95, 99, 99.9)) == whole.percentiles_ms((50, 95, 99, 99.9))
    assert together.spread().mean_ms == pytest.approx(whole.spread().mean_ms)
    assert together.spread().max_ms == whole.spread().max_ms == 1e3 * max(values_s)


def test_values_that_never_came_are_the_slowest() -> None:
    latencies = Latencies([0.1] * 96)
    assert latencies.percentiles_ms([95], missing=4) == pytest.approx([100], rel=0.001)
    assert latencies.percentiles_ms([97], missing=4) == [math.inf]
    assert Latencies().percentiles_ms([50], missing=1) == [math.inf]
    assert math.isnan(Latencies().percentiles_ms([50])[0])


def test_tallies_of_workers_add_up_to_the_tally_of_all() -> None:
    slo = parse_slo("ttft_p95<300ms")
    samples = [sample(0.2, 1.2), sample(0.4, 0.9), sample(None, 1.0, 0, "TimedOut"), sample(0.1, 0.3, 2, "cut")]
    (whole,) = tally_up(samples, slo).values()
    together = Tally("m")
    for one in samples:
        (part,) = tally_up([one], slo).values()
        together.merge(Tally.from_json(json.loads(json.dumps(part.to_json()))))
    assert together.summary(slo) == whole.summary(slo)
    assert whole.summary(slo).good == 1


def test_an_objective_holds_when_each_limit_does() -> None:
    slo = parse_slo("ttft_p50 < 0.3s, itl_mean<120ms,e2e_max<2s, errors<30%")
    (summary,) = summarize([sample(0.2, 1.2), sample(0.25, 1.25), sample(0.4, 1.4)], slo)
    assert summary.slo_met
    assert [verdict.limit for verdict in summary.verdicts] == [
        "ttft_p50<0.3s",
        "itl_mean<120ms",
        "e2e_max<2s",
        "errors<30%",
    ]
    assert (summary.good, summary.goodput_per_s) == (2, pytest.approx(2 / 1.4))


def test_requests_that_failed_count_as_infinitely_slow() -> None:
    slo = parse_slo("ttft_p95<300ms, errors<50%")
    good = [sample(0.2, 1.2)] * 9
    (summary,) = summarize([*good, sample(None, 1.0, 0, "TimedOut")], slo)
    ttft, errors = summary.verdicts
    assert (ttft.met, ttft.value) == (False, math.inf)
    assert errors.met and errors.value == pytest.approx(10)
    assert summary.ttft.p95_ms == pytest.approx(200, rel=0.001), "the table's percentiles are of what came"
    (summary,) = summarize([*good, sample(0.1, 0.5, 3, "StreamBroken")], slo)
    assert summary.verdicts[0].value == math.inf, "also of those whose first token had come"


def test_answers_of_one_token_miss_no_limit_of_the_time_between_tokens() -> None:
    slo = parse_slo("itl_p95<50ms, itl_mean<50ms")
    (summary,) = summarize([sample(0.2, 0.2, 1)] * 5, slo)
    again = Summary.from_json(json.loads(json.dumps(summary.to_json(), allow_nan=False)))
    for one in (summary, again):
        assert one.slo_met and all(math.isnan(verdict.value) for verdict in one.verdicts)
        assert "itl_p95<50ms met (not measured)" in token_table([one])
    (summary,) = summarize([sample(0.2, 0.2, 1), sample(None, 1.0, 0, "TimedOut")], slo)
    assert not summary.slo_met, "what failed has no gap because it failed"


@pytest.mark.parametrize("limit", ["ttft_p95<1s", "answer_max<1s", "itl_mean<1s"])
def test_an_objective_of_a_streams_tokens_needs_a_stream(limit: str) -> None:
    with pytest.raises(BadInput, match="--no-stream asks for none"):
        parse_slo(f"e2e_p95<2s, {limit}", streamed=False)
    assert parse_slo("e2e_p95<2s, errors<1%", streamed=False)


def test_a_request_is_good_by_its_own_latencies() -> None:
    slo = parse_slo("ttft_p95<300ms, itl_p95<50ms")
    assert slo is not None
    assert is_good(slo, sample(0.2, 0.6))
    assert is_good(slo, sample(0.2, 0.2, 1)), "one token has no gap"
    assert not is_good(slo, sample(0.3, 0.7))
    assert not is_good(slo, sample(0.2, 0.9))
    assert not is_good(slo, sample(0.2, 0.6, 11, "StreamBroken"))


@pytest.mark.parametrize(
    "text",
    [
        "ttft<200ms",
        "ttft_p95<200",
        "ttft_p95>200ms",
        "tfft_p95<200ms",
        "ttft_p95<0ms",
        "errors<1",
        "fast",
        "ttft_p950<1s",
    ],
)
def test_a_malformed_objective_gets_one_clear_line(text: str) -> None:
    with pytest.raises(BadInput, match="an SLO's") as caught:
        parse_slo(f"itl_p95<50ms, {text}")
    assert "\n" not in str(caught.value)
    assert "--slo" in (caught.value.hint or "")


def test_no_objective_is_none() -> None:
    assert parse_slo(" ") is None


def pieces(*texts: str, thoughts: int = 0) -> list[Piece]:
    return [Piece(text, 0.1 * n, thought=n <= thoughts) for n, text in enumerate(texts, start=1)]


@pytest.mark.parametrize(
    ("answer", "expected_s"),
    [
        (pieces("Paris", " it is"), 0.1),  # no thoughts: the first token
        (pieces("let me", " see</think>", "\n\n", "Paris"), 0.4),  # the prompt opened the thoughts
        (pieces("<think>", "see</th", "ink>Paris"), 0.3),  # the end is cut in two
        (pieces("<think>", "for ever"), None),
        (pieces("see", "again", "Paris", thoughts=2), 0.3),  # the server tells thoughts apart
        (pieces("see", "\n", "Paris", thoughts=1), 0.3),
    ],
)
def test_the_first_answer_token_is_the_first_after_the_thoughts(answer: list[Piece], expected_s: float | None) -> None:
    clock = AnswerClock()
    for piece in answer:
        clock.add(piece)
    assert clock.first_answer_s(whole=True) == (None if expected_s is None else pytest.approx(expected_s))


def test_of_an_answer_that_was_cut_off_nobody_knows_whether_it_thought() -> None:
    clock = AnswerClock()
    for piece in pieces("hm", "well"):
        clock.add(piece)
    assert clock.first_answer_s(whole=False) is None


def test_a_first_answer_token_is_told_of_answers_that_thought_before() -> None:
    (summary,) = summarize([sample(0.2, 1.2, answer_s=0.2), sample(0.1, 0.4, 3, "cut")])
    assert summary.with_thoughts == 0 and "first answer token" not in token_table([summary])
    (summary,) = summarize([sample(0.2, 1.2, answer_s=0.2), sample(0.2, 1.2, answer_s=0.7)])
    assert summary.with_thoughts == 1 and "first answer token" in token_table([summary])
