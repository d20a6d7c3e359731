"""Figures have intervals, differences have tests, and every model is asked by the same code."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.build import texts
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.recipe import EvaluateOptions, load_recipe
from stillhouse.cli.main import run as command
from stillhouse.engine.errors import UsageError
from stillhouse.tune import stats
from stillhouse.tune.built_versions import built_in, live_of, versions_of
from stillhouse.tune.evaluate_commands import NAMES, change_lines
from stillhouse.tune.evaluation import evaluate, figures
from stillhouse.tune.evaluation_picture import PICTURE, draw_changes
from stillhouse.tune.evaluation_recipe import failures, load_evaluation
from stillhouse.tune.torch_runner import TorchRunner, load

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A stage cache that nothing lies in yet: what is measured here is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_mcnemar_is_the_exact_binomial_test_of_the_changed_pairs() -> None:
    from scipy.stats import binomtest

    chance = random.Random(3)
    for _ in range(20):
        before = [chance.random() < 0.6 for _ in range(60)]
        after = [right if chance.random() < 0.8 else not right for right in before]
        won = sum(now and not then for now, then in zip(after, before, strict=True))
        lost = sum(then and not now for now, then in zip(after, before, strict=True))
        assert stats.mcnemar(after, before) == pytest.approx(
            binomtest(won, won + lost, 0.5).pvalue if won + lost else 1
        )
    assert stats.mcnemar([True] * 5, [True] * 5) == 1.0


@pytest.mark.parametrize("estimate", [stats.mean, stats.share])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(estimate: Any) -> None:
    rng = np.random.default_rng(0)
    held = sum(not estimate((rng.random(150) < 0.7).tolist()).excludes(0.7) for _ in range(80))
    assert 68 <= held <= 80  # of 95 % expected


@pytest.mark.parametrize("right", [0, 1, 7, 12, 20])
def test_the_interval_of_a_share_is_wilsons(right: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, 20).proportion_ci(method="wilson")
    found = stats.share([True] * right + [False] * (20 - right))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # One of the paper's own: 36 right both times, 12 only after, 2 only before.
    after = [True] * 36 + [True] * 12 + [False] * 2
    before = [True] * 36 + [False] * 12 + [True] * 2
    found = stats.share_difference(after, before)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    all_won = stats.share_difference([True] * 12, [False] * 12)
    assert all_won.value == 1.0 and 0.5 < all_won.low < 0.9 and all_won.high == 1.0


def test_of_one_question_or_a_few_nothing_is_called_more_than_chance() -> None:
    better = {count: stats.perplexity_ratio([10.0] * count, [20.0] * count, [10] * count) for count in (1, 9, 10)}
    assert better[1].low == better[1].high < 1  # resampling one text finds that one text
    assert {count: found.more_than_chance(1.0) for count, found in better.items()} == {1: None, 9: None, 10: True}
    assert stats.more_right_than_chance([True] * 9, [False] * 9) is None
    assert stats.more_right_than_chance([True] * 10, [False] * 10) is True
    one = stats.share([True])
    assert one.low < 0.5 and one.high == 1.0


def test_the_same_gain_is_chance_on_few_questions_and_none_on_many() -> None:
    # 82 % before, 89 % after: of 100 questions, 12 won and 5 lost.
    before = [True] * 77 + [True] * 5 + [False] * 12 + [False] * 6
    after = [True] * 77 + [False] * 5 + [True] * 12 + [False] * 6
    assert stats.mcnemar(after, before) > 0.05
    assert not stats.share_difference(after, before).excludes(0.0)
    assert stats.mcnemar(after * 8, before * 8) < 0.001
    assert stats.share_difference(after * 8, before * 8).excludes(0.0)


def test_a_perplexity_ratio_is_paired_by_text_and_weighted_by_tokens() -> None:
    tokens = [10, 30, 5]
    before = [25.0, 61.0, 14.0]
    assert stats.perplexity_ratio(before, before, tokens) == stats.Estimate(1.0, 1.0, 1.0, 3)
    better = [loss - 0.1 * count for loss, count in zip(before, tokens, strict=True)]
    ratio = stats.perplexity_ratio(better, before, tokens)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx([math.exp(-0.1)] * 3)
    assert stats.perplexity(before, tokens).value == pytest.approx(math.exp(100 / 45))


def test_torch_behind_the_runner_gives_the_logits_of_a_plain_forward(tiny_base: Path) -> None:
    import torch

    model = load(tiny_base)
    runner = TorchRunner(model)
    chance = random.Random(0)
    rows = [[chance.randrange(1024) for _ in range(length)] for length in (12, 7, 20)]
    with torch.no_grad():
        whole = [model(torch.tensor([row])).logits[0].numpy() for row in rows]
    for slot, row in enumerate(rows):
        found = runner.prefill(slot, row[:4], 0)
        np.testing.assert_allclose(found, whole[slot][:4], atol=1e-4)
        last = runner.prefill(slot, row[4:6], 4, last_only=True)
        np.testing.assert_allclose(last, whole[slot][5:6], atol=1e-4)
        again = runner.prefill(slot, row[3:6], 3)  # back, and once more
        np.testing.assert_allclose(again, whole[slot][3:6], atol=1e-4)
    places = [6, 6, 6]
    for _ in range(8):
        found = runner.decode([row[at] for row, at in zip(rows, places, strict=True)], places)
        for slot, at in enumerate(places):
            np.testing.assert_allclose(found[slot], whole[slot][at], atol=1e-4)
        # The shortest row is done at its last place and is decoded there once more.
        places = [min(at + 1, len(row) - 1) for row, at in zip(rows, places, strict=True)]


@pytest.fixture(scope="module")
def asked(
    tuned: tuple[Path, dict[str, Any]], tiny_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recipe that measures the test split, tasks of both forms, other records and general text."""
    folder = tmp_path_factory.mktemp("evaluate")
    records = [json.loads(line) for line in (dataset / "train.jsonl").read_text("utf-8").splitlines()]
    tasks = [{"prompt": r["instruction"], "answer": r["output"], "max_tokens": 24} for r in records[:24]]
    others = [r["output"] for r in records[::-1]]
    tasks += [
        {"prompt": r["instruction"], "choices": [r["output"], other], "answer": 0}
        for r, other in zip(records[:12], others, strict=False)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), "utf-8")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'name = "tiny"\nbase = "{tiny_base}"\nadapters = ["{tuned[0]}"]\nprecisions = ["fp16"]\n'
        f'[evaluate]\ntasks = "tasks.jsonl"\ngeneral = "{dataset}/validation.jsonl"\n'
        f'[gate.fp16]\ntask_accuracy = 0\n[tune]\ndata = "{dataset}"\n',
        "utf-8",
    )
    return recipe


@pytest.fixture(scope="module")
def evaluated(asked: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LEAST_TOKENS", 1_000)
        return figures(evaluate(load_evaluation(asked), []))


def test_before_and_after_are_measured_and_the_gain_is_told_from_chance(
    evaluated: list[dict[str, Any]], tuned: tuple[Path, dict[str, Any]]
) -> None:
    base, after = evaluated
    card = tuned[1]
    # The build's asking and the trainer agree on what the held-out answers cost.
    assert base["records_perplexity"]["value"] == pytest.approx(card["before"]["test"]["perplexity"], rel=1e-3)
    assert after["records_perplexity"]["value"] == pytest.approx(card["after"]["test"]["perplexity"], rel=1e-3)
    gain = after["change"]["records_perplexity_ratio"]
    assert gain["more_than_chance"] and gain["high"] < 1
    assert after["against"] == "base"
    assert {"exact_match_accuracy", "multiple_choice_accuracy", "tasks_accuracy", "answer_tokens"} <= set(after)
    assert after["text_perplexity"]["low"] < after["text_perplexity"]["value"] < after["text_perplexity"]["high"]


@pytest.mark.slow
def test_a_built_precision_is_held_against_the_merge_by_the_same_code_as_the_gate(
    asked: Path, evaluated: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    from stillhouse.build import pipeline

    repository = asked.parent / "repository"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LEAST_TOKENS", 1_000)
        built = pipeline.build(load_recipe(asked), repository).results[0]  # which leaves [tune] to its command
        assert built.status == "published", built.reason
        versions = live_of(load_evaluation(asked), repository)
        assert versions == [built.path]
        rows = figures(evaluate(load_evaluation(asked), versions))
    fp16 = rows[2]
    assert (fp16["model"], fp16["against"], fp16["gate"]) == ("tiny-fp16 v1", "tuned", None)
    assert fp16["records_perplexity"]["value"] == pytest.approx(evaluated[1]["records_perplexity"]["value"], rel=0.01)
    assert fp16["change"]["tasks_accuracy"]["more_than_chance"] is False
    assert rows[:2] == evaluated
    assert "other adapters" not in caplog.text
    alone = load_evaluation(asked).model_copy(update={"adapters": []})
    checkpoint = open_checkpoint(alone.base)
    assert [subject.name for subject in versions_of(alone, checkpoint, versions)] == ["tiny-fp16 v1"]
    assert "was built from other adapters" in caplog.text


def test_each_change_is_said_in_a_line_with_its_verdict(evaluated: list[dict[str, Any]]) -> None:
    lines = change_lines(evaluated[1])
    assert lines[0] == "tuned against base:"
    assert any("held-out answers" in line and line.endswith("more than chance") for line in lines)
    assert any("McNemar p =" in line for line in lines)
    assert any("general text" in line and line.endswith("too few to tell") for line in lines)  # two windows


def test_what_changed_is_a_picture(evaluated: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_changes(evaluated, NAMES, tmp_path)
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    draw_changes(evaluated[:1], NAMES, tmp_path / "nowhere")  # of a base alone there is none


@pytest.mark.parametrize(
    ("better", "not_worse", "fails"),
    [
        (["records_perplexity"], [], []),
        (["general_perplexity"], ["records_perplexity"], ["general_perplexity_ratio"]),  # there it may be chance
        (["tasks_accuracy"], [], ["exact_match_accuracy"]),  # which are all the tasks there are; it got worse
        (
            ["text_perplexity"],
            ["text_perplexity"],
            ["text_perplexity_ratio"],
        ),  # too few to tell is no gain, and no loss
        ([], ["tasks_accuracy", "general_perplexity"], ["exact_match_accuracy"]),
    ],
)
def test_a_gate_holds_what_is_better_or_not_worse_by_more_than_chance(
    better: list[Any], not_worse: list[Any], fails: list[str]
) -> None:
    changes = {
        "records_perplexity_ratio": {"value": 0.8, "more_than_chance": True},
        "general_perplexity_ratio": {"value": 0.9, "more_than_chance": False},
        "exact_match_accuracy": {"value": -0.2, "more_than_chance": True},
        "text_perplexity_ratio": {"value": 0.7, "more_than_chance": None},
    }
    assert failures(changes, EvaluateOptions(better=better, not_worse=not_worse)) == fails


def test_a_recipe_without_questions_is_refused_and_one_without_adapters_has_no_after(
    tiny_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LEAST_TOKENS", 1_000)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n', "utf-8")
    with pytest.raises(UsageError, match="neither records nor tasks"):
        evaluate(load_recipe(recipe), [])
    recipe.write_text(recipe.read_text("utf-8") + f'[evaluate]\nrecords = "{dataset}/test.jsonl"\n', "utf-8")
    assert [row["model"] for row in figures(evaluate(load_recipe(recipe), []))] == ["base"]


def test_the_versions_of_one_build_are_found_by_its_own_report(tmp_path: Path, asked: Path) -> None:
    results = [{"path": str(tmp_path / "tiny-fp16" / "3")}, {"path": None}]  # the second did not hold its gate
    (tmp_path / "build.json").write_text(json.dumps({"results": results}), "utf-8")
    assert built_in(tmp_path) == [tmp_path / "tiny-fp16" / "3"]
    with pytest.raises(UsageError, match="says of no build"):
        built_in(tmp_path / "nowhere")
    assert command(["evaluate", str(asked), "--built", str(tmp_path), "--no-versions"]) == 2
