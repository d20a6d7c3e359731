"""Tasks are read or refused by their line, scored as they say, and a build is gated on what it keeps of them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.build import pipeline
from stillhouse.build.answers import choose, compare, greedy, greedy_agreement, judge_tasks
from stillhouse.build.recipe import load_recipe
from stillhouse.build.tasks import Task, Tasks, read_tasks
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.manifest import GateRecord

QUESTION = '{"prompt": "2 + 2 =", "choices": ["4", "5"], "answer": 0}'


class Copycat:
    """A runner of 8 tokens that finds the token after the last one most likely; 7 is the end."""

    def __init__(self) -> None:
        self.prefilled: list[tuple[int, ...]] = []

    def prefill(self, slot: int, tokens: Sequence[int], past: int, *, last_only: bool = False) -> Any:
        self.prefilled.append((slot, past, *tokens))
        return self._rows(tokens)[-1:] if last_only else self._rows(tokens)

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Any:
        assert len(tokens) == len(lengths)
        return self._rows(tokens)

    def _rows(self, tokens: Sequence[int]) -> Any:
        rows = np.zeros((len(tokens), 8), np.float32)
        rows[np.arange(len(tokens)), [(token + 1) % 8 for token in tokens]] = 5.0
        return rows


def test_greedy_answers_stop_at_the_end_token_or_at_their_length() -> None:
    prompts = [[1, 2], [5], [3, 3, 3], *([[0]] * 7)]
    answered = greedy(Copycat(), prompts, [10, 10, 2, *([1] * 7)], {7})
    assert answered[:3] == [[3, 4, 5, 6, 7], [6, 7], [4, 5]]
    assert answered[3:] == [[1]] * 7


def test_the_choice_that_is_most_likely_a_character_wins() -> None:
    runner = Copycat()
    assert choose(runner, [0, 1, 2], [[4, 5], [3, 4], [3]], [2, 2, 1]) == 1
    # The prompt is run once, each choice behind it with the prompt's last token.
    assert runner.prefilled == [(0, 0, 0, 1), (0, 2, 2, 4, 5), (0, 2, 2, 3, 4), (0, 2, 2, 3)]


def test_greedy_agreement_is_the_share_before_the_first_difference() -> None:
    assert greedy_agreement([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(0.75)
    assert greedy_agreement([[1, 2]], [[1, 2, 3, 4]]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("47 days", " 47 days.", True),
        ("47 days", "47 Days\n", True),
        ("47 days", "<think>is it 30 days?</think>\n\n47 days", True),
        (["yes", "of course"], "Of course!", True),
        ("47 days", "You have 47 days", False),
    ],
)
def test_an_answer_is_compared_but_for_case_and_what_surrounds_it(answer: Any, text: str, right: bool) -> None:
    assert Task(prompt="?", answer=answer).is_right(text) is right


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        pytest.param('{"a": ' + "1" * 5000 + "}", "line 2 is not JSON", id="digits"),
        pytest.param("[" * 100_000, "line 2 is not JSON", id="depth"),
        ("[1]", "line 2 is no task"),
        ('{"prompt": "?"}', "line 2 has no 'answer'"),
        ('{"answer": "4"}', "give prompt or messages"),
        ('{"prompt": "?", "answer": 4}', "without choices the answer is a text"),
        ('{"prompt": "?", "answer": "."}', "without choices the answer is a text"),
        ('{"prompt": "?", "choices": ["a", "b"], "answer": 2}', "is no place among 2 choices"),
        ('{"prompt": "?", "choices": ["a", "b"], "answer": "c"}', "the answer 'c' is not one of the choices"),
        ('{"prompt": "?", "choices": ["a"], "answer": 0}', "choices"),
        ('{"prompt": "?", "answer": "a", "max_token": 4}', "has an unknown key 'max_token'"),
    ],
)
def test_a_line_that_is_no_task_is_refused_by_its_number(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(f"{QUESTION}\n{line}\n", "utf-8")
    with pytest.raises(StillhouseError) as refused:
        read_tasks(str(file))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_share_of_the_original_is_gated_and_an_original_that_knows_nothing_is_refused() -> None:
    tasks = Tasks("t.jsonl", "0" * 64, [Task.model_validate_json(QUESTION)] * 4)
    known, kept = (
        {"greedy": [[1]], "right": right} for right in ([True, True, True, False], [True, True, False, True])
    )
    record = compare(known, kept, tasks).tasks
    assert record is not None
    assert (record.tasks, record.accuracy, record.reference_accuracy, record.accuracy_share) == (4, 0.75, 0.75, 1.0)
    low = record.model_copy(update={"accuracy": 0.5, "accuracy_share": 2 / 3})
    assert judge_tasks(record, GateRecord(task_accuracy=0.9)) is None
    assert judge_tasks(low, GateRecord()) is None
    assert "is 66.7% of the original's 0.750, below 90%" in (judge_tasks(low, GateRecord(task_accuracy=0.9)) or "")
    with pytest.raises(StillhouseError, match="answers none of the 4 tasks"):
        compare({"greedy": [[1]], "right": [False] * 4}, kept, tasks)


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions of words from the tokenizer's text; a random model gets some of them right."""
    chance = random.Random(0)
    words = ["the", "return", "function", "value", "class", "module", "name", "string", "object", "list", "import"]
    lines = []
    for _ in range(40):
        choices = [" ".join(chance.sample(words, chance.randint(1, 3))) for _ in range(3)]
        lines.append({"prompt": " ".join(chance.sample(words, 5)), "choices": choices, "answer": chance.randrange(3)})
    file = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines if len(set(line["choices"])) == 3), "utf-8")
    return file


@pytest.mark.slow
@pytest.mark.usefixtures("kept_cache")
def test_a_build_measures_the_tasks_as_transformers_does_and_is_gated_on_them(
    tasks_file: Path, tiny_base: Path, tiny_adapter: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    more = f'[evaluate]\ntasks = "{tasks_file}"\n'
    recipe = load_recipe(write_recipe(tiny_adapter, more=more))
    (result,) = pipeline.build(recipe, tmp_path / "repository").results
    assert result.status == "published"
    assert result.path is not None
    manifest = json.loads((result.path / "manifest.json").read_text())
    quality = manifest["quality"]
    assert quality["tasks"]["reference_accuracy"] == pytest.approx(accuracy(tasks_file, tiny_base, tiny_adapter))
    assert quality["tasks"]["accuracy_share"] == pytest.approx(1.0)
    assert (quality["greedy_prompts"], quality["gate"]["task_accuracy"]) == (12, 0.9)
    assert quality["greedy_agreement"] > 0.9
    assert (manifest["recipe"]["evaluate"]["tasks"], len(quality["tasks"]["sha256"])) == ("tasks.jsonl", 64)
    strict = load_recipe(write_recipe(tiny_adapter, more=more + "[gate.fp16]\ntask_accuracy = 1.5\n"))
    (failed,) = pipeline.build(strict, tmp_path / "repository").results
    assert (failed.status, failed.version) == ("failed", None)
    assert "below 150%" in (failed.reason or "")


def accuracy(file: Path, base: Path, adapter: Path) -> float:
    """Accuracy by transformers and peft alone: log-probability a character of each choice in the chat template."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    right = []
    for line in file.read_text().splitlines():
        task = json.loads(line)
        messages = [{"role": "user", "content": task["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        scores = []
        for choice in task["choices"]:
            ids = tokenizer(prompt + choice, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                rows = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            scores.append(float(rows.gather(1, ids[0, start:, None]).sum()) / len(choice))
        right.append(scores.index(max(scores)) == task["answer"])
    return sum(right) / len(right)
