"""The search for a capacity and the comparison of two runs, over figures whose truth is known."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stillhouse.client import ConnectionFailed
from stillhouse.loadtest.capacity import QUICK, THOROUGH, Capacity, Effort, capacity_table, find_capacity, search
from stillhouse.loadtest.commands import app
from stillhouse.loadtest.diff import ERRORS, changes, diff_table, read_run, worse
from stillhouse.loadtest.errors import BadInput, Missed, RunFailed
from stillhouse.loadtest.load import Load
from stillhouse.loadtest.run import LoadResult
from stillhouse.loadtest.samples import Sample
from stillhouse.loadtest.slo import parse_slo
from stillhouse.loadtest.tally import summarize


def measured(
    rate: float, *, meets: bool, problems: tuple[str, ...] = (), outcome: str = "ok", **details: Any
) -> LoadResult:
    ttft_s = 0.1 if meets else 0.5
    samples = [Sample("m", n / rate, n / rate + 1, ttft_s, 1.0, 5, True, outcome) for n in range(20)]
    (summary,) = summarize(samples, parse_slo("ttft_p95<200ms"))
    details = {"client": {"problems": list(problems)}, **details}
    return LoadResult("m", 1, summary, None, load=Load(rate=rate), details=details)


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


@pytest.mark.parametrize(
    ("cut", "error"), [({"ended_early": "it died"}, RunFailed), ({"interrupted": True}, KeyboardInterrupt)]
)
def test_a_search_that_is_cut_short_ends_and_leaves_its_probes(cut: dict[str, Any], error: type[Exception]) -> None:
    probes: list[LoadResult] = []
    with pytest.raises(error):
        search(lambda rate: measured(rate, meets=True, **(cut if rate == 4 else {})), 1.0, probes=probes)
    assert [probe.load.rate for probe in probes] == [1, 2, 4]
    left = Capacity.without_end(probes)
    rows = [line.split("|")[1].strip() for line in capacity_table(left).splitlines()[2:]]
    assert rows == ["met", "met", "cut short"]
    value = json.loads(json.dumps(left.to_json(), allow_nan=False))
    assert value["rate"] is None and len(value["probes"]) == 3


def test_a_server_that_answers_nothing_is_not_searched_for_a_slower_rate() -> None:
    seen: list[float] = []

    def refused(rate: float) -> LoadResult:
        seen.append(rate)
        return measured(rate, meets=True, outcome="Overloaded")

    with pytest.raises(RunFailed, match=r"no request succeeded at 1 requests/s \(Overloaded 20\)"):
        search(refused, 1.0)
    assert seen == [1]
    found = search(lambda rate: measured(rate, meets=True, outcome="ok" if rate <= 4 else "TimedOut"), 1.0)
    assert found.rate <= 4, "beyond what it can take, none may be answered in time"


def test_an_end_point_is_repeated_with_other_arrivals(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Load] = []

    def run(url: str, model: str, load: Load, **_: Any) -> LoadResult:  # noqa: ARG001
        loads.append(load)
        return measured(load.rate, meets=load.rate <= 3)

    monkeypatch.setattr("stillhouse.loadtest.capacity.run_locust", run)
    found = find_capacity("h:1", "m", Load(slo="ttft_p95<200ms", seed=7))
    assert [load.seed for load in loads if load.rate == found.rate] == [7, 8, 9]
    assert {load.seed for load in loads if load.rate != found.rate} == {7}, "or the rates would not compare"


def test_the_command_shows_and_saves_what_was_tried_before_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(url: str, model: str, load: Load, **_: Any) -> LoadResult:  # noqa: ARG001
        if load.rate > 2:
            raise ConnectionFailed("cannot reach h:1")
        return measured(load.rate, meets=True)

    monkeypatch.setattr("stillhouse.loadtest.capacity.run_locust", run)
    words = ["capacity", "h:1", "--slo", "ttft_p95<200ms", "--save", str(tmp_path / "c")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConnectionFailed)
    assert [line.split("|")[0].strip() for line in done.stdout.splitlines()[2:]] == ["1.00", "2.00"]
    value = json.loads((tmp_path / "c.json").read_text())
    assert [probe["settings"]["rate"] for probe in value["capacity"]["probes"]] == [1, 2]
    with (tmp_path / "c.csv").open(newline="") as file:
        assert [row["load"] for row in csv.DictReader(file)] == ["1.00/s", "2.00/s"], "a row a probe"


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


def test_new_errors_are_worse_by_their_points_unless_it_is_chance() -> None:
    assert ERRORS in {one.metric for one in worse(changes(run_of(1), run_of(2, failing=0.3)), 0.1)}
    broken_at_the_end = [
        replace(one, outcome="StreamBroken") if n >= 280 else one for n, one in enumerate(run_of(2, count=300))
    ]
    errors = changes(run_of(1), broken_at_the_end)[-1]
    assert (errors.a, errors.b) == (0, pytest.approx(100 * 20 / 300))
    assert 3 < errors.low < errors.b < errors.high < 11
    assert worse([errors], 0.1) == [errors], "though they are fewer than 10 %"
    one_of_many = [replace(one, outcome="StreamBroken") if n == 9 else one for n, one in enumerate(run_of(2))]
    assert worse(changes(run_of(1), one_of_many), 0.1) == []
    assert worse(changes(broken_at_the_end, run_of(1)), 0.1) == []


def test_a_latency_that_is_gone_is_worse() -> None:
    gone = [replace(one, tokens=1) for one in run_of(1)]
    assert "itl p95 ms gone" in map(str, worse(changes(run_of(1), gone), 0.1))
    assert worse(changes(gone, gone), 0.1) == []


def saved(path: Path, **more: Any) -> str:
    fields = list(Sample.__dataclass_fields__)
    value = {"sample_fields": fields, "samples": [astuple(one) for one in run_of(1)], **more}
    path.write_text(json.dumps(value))
    return str(path)


@pytest.mark.parametrize(
    ("more", "doubt"),
    [
        ({"client": {"problems": ["it was late"]}}, "it was late"),
        ({"ended_early": "the server is gone"}, "the server is gone"),
        ({"interrupted": True}, "it was interrupted"),
    ],
)
def test_runs_that_are_not_whole_or_not_valid_are_doubted_and_pass_no_gate(
    tmp_path: Path, more: dict[str, Any], doubt: str
) -> None:
    words = ["diff", saved(tmp_path / "a.json"), saved(tmp_path / "b.json", **more)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "b.json: " in done.stderr and doubt in done.stderr
    done = CliRunner().invoke(app, [*words, "--fail-over", "10%"])
    assert isinstance(done.exception, Missed) and doubt in str(done.exception)


def test_settings_that_differ_are_told(tmp_path: Path) -> None:
    a, b = (
        saved(tmp_path / f"{rate}.json", settings={"rate": rate, "host": f"h:{rate}", "users": 4}) for rate in (2, 3)
    )
    done = CliRunner().invoke(app, ["diff", a, b, "--fail-over", "10%"])
    assert done.exit_code == 0
    assert done.stderr.splitlines() == ["warning: the settings differ: rate 2 -> 3"]


def test_files_without_samples_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, error in (
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        (json.dumps({"samples": []}), "holds no"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput, match=error):
            read_run(path)
    with pytest.raises(BadInput, match="cannot read"):
        read_run(tmp_path / "nowhere.json")
