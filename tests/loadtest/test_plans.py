"""Arrivals, shapes and workloads: when what is sent."""

from __future__ import annotations

import functools
import json
import operator
import statistics
from itertools import islice, pairwise, takewhile
from pathlib import Path

import pytest

from stillhouse.loadtest.arrivals import Stage, level_at, plan, turns
from stillhouse.loadtest.errors import BadInput
from stillhouse.loadtest.prompts import load_workload
from stillhouse.loadtest.shapes import NAMED, load_shape
from stillhouse.loadtest.synthetic import parse_synthetic

STEADY = (Stage(0.0, 20.0, 20.0),)


def test_constant_arrivals_are_evenly_spaced_whoever_sends_them() -> None:
    alone = list(islice(plan(STEADY, "constant", 0, for_ever=True), 12))
    assert alone == pytest.approx([n / 20 for n in range(12)])
    parts = [list(islice(plan(STEADY, "constant", 0, share=n, shares=3, for_ever=True), 4)) for n in range(3)]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == pytest.approx(alone)


def test_poisson_arrivals_have_the_rate_and_its_spread() -> None:
    shares = [islice(plan(STEADY, "poisson", 7, share=n, shares=4, for_ever=True), 2000) for n in range(4)]
    times = sorted(functools.reduce(operator.iadd, map(list, shares), []))
    until_s = 80
    times = [time for time in times if time < until_s]
    assert len(times) == pytest.approx(20 * until_s, rel=0.1)
    gaps = [after - before for before, after in pairwise(times)]
    # An exponential's deviation is its mean.
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.15)


def test_the_seed_fixes_the_arrivals() -> None:
    def first(seed: int) -> list[float]:
        return list(islice(plan(STEADY, "poisson", seed, for_ever=True), 5))

    assert first(1) == first(1) != first(2)


def test_a_changing_rate_is_followed() -> None:
    stages = (Stage(10, 0, 10), Stage(10, 2, 2))
    times = list(plan(stages, "constant", 0))
    assert len(times) == 70, "the areas: 50 and 20"
    assert times == sorted(times)
    ramp = list(takewhile(lambda time: time < 10, times))
    assert len(ramp) == 50
    assert sum(time < 5 for time in ramp) == pytest.approx(50 / 4, abs=1), "a quarter in the first half"
    assert times[50:53] == pytest.approx([10, 10.5, 11])
    assert level_at(stages, 5) == 5 and level_at(stages, 12) == 2 and level_at(stages, 20) is None


def test_unknown_arrivals_are_refused() -> None:
    with pytest.raises(BadInput, match="poisson or constant"):
        next(plan(STEADY, "bursty", 0))


@pytest.mark.parametrize("name", NAMED)
def test_named_shapes_are_of_a_rate(name: str) -> None:
    assert load_shape(name, 4.0).duration_s > 0
    with pytest.raises(BadInput, match="is of a rate"):
        load_shape(name)


def test_a_shape_is_a_table_of_stages(tmp_path: Path) -> None:
    path = tmp_path / "shape.toml"
    path.write_text(
        'unit = "users"\n[[stage]]\nduration_s = 5\nlevel = 2\n[[stage]]\nduration_s = 10\nfrom = 2\nto = 6\n'
    )
    shape = load_shape(str(path))
    assert shape.in_users
    assert shape.stages == (Stage(5, 2, 2), Stage(10, 2, 6))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "no stages"),
        ("stage = 3", "no stages"),
        ("[[stage]]\nlevel = 1", "stage 1: duration_s is a number"),
        ("[[stage]]\nduration_s = 0\nlevel = 1", "stage 1: duration_s is above 0"),
        ('[[stage]]\nduration_s = 1\nlevel = "x"', "stage 1: level is a number"),
        ("[[stage]]\nduration_s = 1\nlevel = 1\nlevle = 2", "stage 1: unknown levle"),
        ("[[stage]]\nduration_s = 1\nlevel = inf", "stage 1: level is a number"),
        ("[[stage]]\nduration_s = 1\nlevel = 0", "every level is 0"),
        ('unit = "cows"\n[[stage]]\nduration_s = 1\nlevel = 1', "known unit"),
        ("[[stage", "is not TOML"),
    ],
)
def test_a_bad_shape_is_named(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "shape.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=error):
        load_shape(str(path))


def test_a_missing_shape_says_what_there_is() -> None:
    with pytest.raises(BadInput, match="cannot read the shape") as caught:
        load_shape("nowhere")
    assert "ramp, steps, spike, soak" in (caught.value.hint or "")


def test_sharegpt_files_bring_their_first_questions(tmp_path: Path) -> None:
    talks = [
        {"id": "1", "conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"}]},
        {"id": "2", "conversations": [{"from": "gpt", "value": "Hello"}, {"from": "human", "value": "Two?"}]},
    ]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(talks, indent=1))
    workload = load_workload(path)
    assert [prompt["messages"][0]["content"] for prompt in workload.prompts] == ["One?", "Two?"]
    assert workload.times_s is None


def test_conversations_without_a_question_are_left_out_and_counted(tmp_path: Path) -> None:
    talks = [[], [{"from": "gpt", "value": "Hello"}], [{"from": "human", "value": "Two?"}]]
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([{"conversations": talk} for talk in talks]))
    workload = load_workload(path, system_prompt="Be brief.")
    assert [prompt["messages"][-1]["content"] for prompt in workload.prompts] == ["Two?"]
    assert workload.left_out == 2


def test_a_prompt_may_hold_what_unicode_calls_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "one\u2028line\x85more"}\r\n{"prompt": "two"}\r\n'.encode())
    assert [prompt["prompt"] for prompt in load_workload(path).prompts] == ["one\u2028line\x85more", "two"]


def test_a_trace_has_times_lengths_and_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"prompt": "b", "at_s": 12.5, "max_tokens": 3}, {"prompt": "a", "at_s": 10}]
    path.write_text("\n".join(map(json.dumps, lines)))
    workload = load_workload(path)
    assert workload.times_s == [0.0, 2.5]
    assert workload.prompts == [{"prompt": "a"}, {"prompt": "b", "max_tokens": 3}]
    assert [turns(workload.times_s or [], n, 2) for n in range(2)] == [[0.0], [2.5]]


def test_a_trace_of_lengths_gets_made_up_texts(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 12, "output_length": 5}\n'
        '{"timestamp": 3000, "input_length": 7, "output_length": 1}\n'
    )
    workload = load_workload(path)
    assert workload.times_s == [0.0, 3.0]
    assert [len(p["messages"][0]["content"].split()) for p in workload.prompts] == [12, 7]
    assert [p["max_tokens"] for p in workload.prompts] == [5, 1]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"prompt": "a", "at_s": 1}\n{"prompt": "b"}', "only 1 of 2 lines have an arrival time"),
        ('{"prompt": "a", "at_s": -1}', "line 1: at_s is seconds"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens is a whole number"),
        ('{"prompt": "a", "at_s": Infinity}', "line 1: at_s is seconds"),
        ('[{"conversations": []}]', "holds no prompt: none of its 1 conversations has a question"),
        ('[{"conversations": "x"}]', "entry 1: neither"),
    ],
)
def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=error):
        load_workload(path)


def test_made_up_prompts_have_the_lengths_and_are_the_same_for_a_seed() -> None:
    synthetic = parse_synthetic("input=uniform(10, 20), output=normal(8, 2)")
    prompts = load_workload(None, synthetic, seed=3).prompts
    lengths = [len(prompt["messages"][0]["content"].split()) for prompt in prompts]
    assert min(lengths) >= 10 and max(lengths) <= 20 and len(set(lengths)) > 5
    assert statistics.mean(prompt["max_tokens"] for prompt in prompts) == pytest.approx(8, abs=0.6)
    assert load_workload(None, synthetic, seed=3).prompts == prompts != load_workload(None, synthetic, seed=4).prompts
    assert "max_tokens" not in load_workload(None, parse_synthetic("input=5")).prompts[0]


@pytest.mark.parametrize("text", ["input", "output=3", "input=0", "input=uniform(9,2)", "input=x", "input=3, cows=4"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_synthetic(text)
    assert "--synthetic" in (caught.value.hint or "")


def test_a_system_prompt_comes_before_every_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}')
    raw, chat = load_workload(path, system_prompt="Be brief.").prompts
    assert raw["prompt"] == "Be brief.\n\na"
    assert [message["role"] for message in chat["messages"]] == ["system", "user"]
