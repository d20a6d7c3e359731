"""The example's records: their form, their facts, and that training and held-out records share no wording."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parents[2] / "examples" / "support"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SUPPORT / name).read_text(encoding="utf-8").splitlines()]


def words(text: str) -> list[str]:
    """Lower-case words; every number becomes one word, so that templates differing in a number count as equal."""
    return re.findall(r"[a-z@#']+", re.sub(r"\d+(\.\d+)?", "#", text.lower()))


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def asked(record: dict[str, Any]) -> str:
    return f"{record['instruction']} {record['input']}"


@pytest.mark.parametrize("name", ["records.jsonl", "heldout.jsonl", "general.jsonl", "general_heldout.jsonl"])
def test_records_have_instruction_input_and_output(name: str) -> None:
    for record in read(name):
        assert set(record) - {"fact", "complete"} == {"instruction", "input", "output"}
        assert all(isinstance(record[key], str) for key in ("instruction", "input", "output"))
        assert record["instruction"].strip()
        assert record["output"].strip()


def test_there_are_over_300_training_records_and_a_tenth_is_held_out() -> None:
    train, held_out = read("records.jsonl"), read("heldout.jsonl")
    assert len(train) >= 300
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("name", ["records.jsonl", "heldout.jsonl"])
def test_every_answer_states_its_fact(name: str) -> None:
    facts = json.loads((SUPPORT / "facts.json").read_text(encoding="utf-8"))
    for record in read(name):
        for piece in facts[record["fact"]]:
            assert piece in record["output"], record


def test_every_fact_is_both_taught_and_asked() -> None:
    facts = set(json.loads((SUPPORT / "facts.json").read_text(encoding="utf-8")))
    assert {record["fact"] for record in read("records.jsonl")} == facts
    assert {record["fact"] for record in read("heldout.jsonl")} == facts


@pytest.mark.parametrize("name", ["records.jsonl", "heldout.jsonl", "general.jsonl", "general_heldout.jsonl"])
def test_no_question_comes_twice(name: str) -> None:
    questions = [asked(record).lower() for record in read(name)]
    assert len(questions) == len(set(questions))


def test_held_out_questions_share_no_five_words_in_a_row_with_training() -> None:
    taught = set().union(*(runs(asked(record), 5) for record in read("records.jsonl")))
    for record in read("heldout.jsonl"):
        assert not runs(asked(record), 5) & taught, record


def test_held_out_questions_are_no_near_duplicates_of_training() -> None:
    taught = [runs(asked(record), 2) for record in read("records.jsonl")]
    for record in read("heldout.jsonl"):
        mine = runs(asked(record), 2)
        assert max(len(mine & theirs) / len(mine | theirs) for theirs in taught) < 0.25, record


def test_held_out_answers_share_only_the_fact_itself_with_training_answers() -> None:
    facts = json.loads((SUPPORT / "facts.json").read_text(encoding="utf-8"))

    def around_the_fact(record: dict[str, Any]) -> str:
        text: str = record["output"]
        for piece in facts[record["fact"]]:
            text = text.replace(piece, "@")
        return text

    taught = set().union(*(runs(around_the_fact(record), 5) for record in read("records.jsonl")))
    for record in read("heldout.jsonl"):
        assert not runs(around_the_fact(record), 5) & taught, record


def test_general_records_hold_none_of_the_questions_that_are_asked_of_the_models() -> None:
    questions = json.loads((SUPPORT / "questions.json").read_text(encoding="utf-8"))
    assert len(questions["general"]) == 20
    general = {asked(record).strip().lower() for record in read("general.jsonl") + read("general_heldout.jsonl")}
    for item in questions["general"]:
        assert item["question"].strip().lower() not in general, item


def test_general_records_and_their_held_out_part_are_apart() -> None:
    train = {asked(record).lower() for record in read("general.jsonl")}
    assert not [record for record in read("general_heldout.jsonl") if asked(record).lower() in train]
