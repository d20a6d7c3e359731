"""The search for a capacity and the comparison of two runs, over figures whose truth is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stillhouse.loadtest.capacity import QUICK, THOROUGH, Effort, capacity_table, find_capacity, search
from stillhouse.loadtest.diff import changes, diff_table, read_samples, worse
from stillhouse.loadtest.errors import BadInput, Missed, RunFailed
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.tally import summarize


def measured(rate: float, *, meets: bool, problems: tuple[str, ...] = ()) -> LoadResult:
    ttft_s = 0.1 if meets else 0.5
    samples = [Sample("m", n / rate, n / rate + 1, ttft_s, 1.0, 5, True, "ok") for n in range(20)]
    (summary,) = summarize(samples, parse_slo("ttft_p95<200ms"))
    return LoadResult("m", 1, summary, None, load=Load(rate=rate), details={"client": {"problems": list(problems)}})


@pytest.mark.parametrize("effort", [THOROUGH, QUICK])
@pytest.mark.parametrize("truth", [0.07, 0.9, 1.0, 7.3, 120.0])
def test_the_search_comes_within_its_precision_of_the_truth(truth: float, effort: Effort) -> None:
    found = search(lambda rate: measured(rate, meets=rate <= truth), 1.0, effort)
    assert truth / effort.precision <= found.rate <= truth
    assert [probe.load.rate for probe in found.repeats] == [found.rate] * effort.repeats
    assert found.goodput_per_s == found.repeats[0].summary.goodput_per_s
    assert "capacity: " in capacity_table(found)


def test_an_end_point_that_does_not_hold_again_is_lowered() -> None:
    seen: list[float] = []

    def probe(rate: float) -> LoadResult:
        seen.append(rate)
        # Lucky once above 3: the second time it misses.
        return measured(rate, meets=rate <= 3 or (rate <= 4 and seen.count(rate) == 1))

    found = search(probe, 1.0)
    assert 3 / THOROUGH.precision <= found.rate <= 3


def test_a_server_that_never_meets_it_is_told() -> None:
    with pytest.raises(Missed, match="no rate from"):
        search(lambda rate: measured(rate, meets=False), 1.0)


def test_a_busy_load_generator_is_not_taken_for_a_slow_server() -> None:
    with pytest.raises(RunFailed, match="the load generator cannot keep up at 8"):
        search(lambda rate: measured(rate, meets=rate < 8, problems=("busy",) if rate >= 8 else ()), 1.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_capacity_of_a_server_with_two_slots_is_below_what_it_could_ever_serve(slotted_server: Any) -> None:
    """Two answers of 0.2 s at a time are 10 a second at most, and with waiting under an objective less."""
    load = Load(duration_s=8, max_tokens=3, slo="ttft_p90<600ms, errors<5%")
    found = find_capacity(slotted_server.openai_host, "support-int4", load, start=4)
    assert 3 < found.rate <= 11
    assert found.goodput_per_s == pytest.approx(found.rate, rel=0.35)
    missed = [probe.load.rate for probe in found.probes if not probe.summary.slo_met]
    assert max(missed) > found.rate


def test_a_capacity_needs_an_objective() -> None:
    with pytest.raises(BadInput, match="of an objective"):
        find_capacity("localhost:1", "", Load())


def run_of(seed: int, slower: float = 1.0, failing: float = 0.0, count: int = 400) -> list[Sample]:
    chance = random.Random(seed)
    samples = []
    for n in range(count):
        ttft_s = slower * chance.lognormvariate(-2, 0.4)
        e2e_s = ttft_s + 10 * 0.02
        outcome = "TimedOut" if chance.random() < failing else "ok"
        samples.append(Sample("m", n / 10, n / 10 + e2e_s, ttft_s, e2e_s, 11, True, outcome))
    return samples


def test_the_same_server_twice_is_no_change() -> None:
    found = changes(run_of(1), run_of(2))
    assert worse(found, 0.1) == []
    by_name = {one.metric: one for one in found}
    assert by_name["ttft p50 ms"].low < 1 < by_name["ttft p50 ms"].high
    assert by_name["tokens/s"].ratio == pytest.approx(1, abs=0.05)


def test_a_slower_first_token_is_found_with_its_interval() -> None:
    found = changes(run_of(1), run_of(2, slower=1.4))
    by_name = {one.metric: one for one in found}
    ttft = by_name["ttft p50 ms"]
    assert ttft.low < 1.4 < ttft.high
    assert ttft.low > 1.1
    assert {one.metric for one in worse(found, 0.1)} >= {"ttft p50 ms", "ttft p95 ms"}
    assert "itl p50 ms" not in {one.metric for one in worse(found, 0.1)}
    assert worse(changes(run_of(2, slower=1.4), run_of(1)), 0.1) == [], "faster is not worse"
    assert "95 % interval" in diff_table(found)


def test_chance_alone_is_not_worse() -> None:
    """Six requests a side say little: the ratio is beyond 10 %, the interval holds 1."""
    a, b = run_of(1, count=6), run_of(4, slower=1.15, count=6)
    ttft = next(one for one in changes(a, b) if one.metric == "ttft p50 ms")
    assert ttft.low < 1
    assert not ttft.worse_beyond(0.1)


def test_new_errors_are_worse() -> None:
    assert "errors" in {one.metric for one in worse(changes(run_of(1), run_of(2, failing=0.3)), 0.1)}


def test_files_without_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, error in (
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        (json.dumps({"samples": []}), "holds no"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=error):
            read_samples(path)
    with pytest.raises(BadInput, match="cannot read"):
        read_samples(tmp_path / "nowhere.json")
