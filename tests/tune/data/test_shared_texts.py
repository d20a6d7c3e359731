"""Texts that many records share, a system's or an instruction's, make no two of them alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.tune.data_recipe import Duplicates
from stillhouse.tune.duplicates import drop_near
from stillhouse.tune.grouping import groups_of
from stillhouse.tune.own_texts import Own, own_of
from stillhouse.tune.store import Store

SYSTEM = (
    "You are the assistant of Brindlecove, a shop for outdoor goods. Answer in at most two sentences, in a friendly "
    "tone. Never invent facts. If you do not know the answer, say so and give the shop's e-mail address. Never talk "
    "about politics, religion or other shops. Opening hours are nine to six on weekdays and ten to four on Saturdays."
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, tmp_path / "removed.jsonl") as opened:
        yield opened


def _chat(row: dict[str, Any], system: str = SYSTEM) -> dict[str, Any]:
    turns = (("system", system), ("user", row["instruction"][:40]), ("assistant", row["output"][:40]))
    return {"messages": [{"role": role, "content": text} for role, text in turns], "source": {}}


def _behind(instruction: str, row: dict[str, Any], output: str) -> dict[str, Any]:
    return {"instruction": instruction, "input": row["instruction"][-40:], "output": output, "source": {}}


def _left_and_groups(store: Store, folder: Path) -> tuple[list[int], int]:
    options = Duplicates()
    own = own_of((record for _, record in store.living()), options, folder)
    groups = groups_of(store, drop_near(store, own, options, folder), own, options, folder)
    left = [number for number, _ in store.living()]
    return left, len({groups[number] for number in left})


def test_chats_behind_one_system_prompt_are_not_alike_and_copies_of_one_are(
    store: Store, tmp_path: Path, made: Any
) -> None:
    chats = [_chat(row) for row in made(20)]
    for chat in [*chats, _chat(made(4)[3] | {"output": made(4)[3]["output"].upper()})]:
        store.add(chat)
    left, groups = _left_and_groups(store, tmp_path)
    assert left == list(range(20))
    assert groups == 20


def test_inputs_behind_one_instruction_are_not_alike_nor_in_one_group(store: Store, tmp_path: Path, made: Any) -> None:
    for row in made(20):
        store.add(_behind(SYSTEM, row, "positive"))
    assert _left_and_groups(store, tmp_path) == (list(range(20)), 20)


def test_one_input_behind_two_instructions_stays_twice_in_one_group(store: Store, tmp_path: Path, made: Any) -> None:
    other = "Which goods of the shop does this customer write about? Name each of them once, in the order of the text."
    for row in made(10):
        store.add(_behind(SYSTEM, row, "positive"))
        store.add(_behind(other, row, "positive"))
    assert _left_and_groups(store, tmp_path) == (list(range(20)), 10)


def test_a_copy_with_another_word_in_the_shared_text_is_one_still(store: Store, tmp_path: Path, made: Any) -> None:
    for row in made(10):
        store.add(_behind(SYSTEM, row, "positive"))
    for at, row in enumerate(made(10)):
        store.add(_chat(row, system=f"{SYSTEM} It is the {at}th of May."))
    store.add(_behind(SYSTEM.replace("friendly", "frendly"), made(4)[3], "positive"))
    assert _left_and_groups(store, tmp_path) == (list(range(20)), 20)


def test_a_text_is_shared_where_five_records_go_on_differently(tmp_path: Path, made: Any) -> None:
    def own(records: list[dict[str, Any]]) -> Own:
        return own_of(records, Duplicates(), tmp_path)

    rows = made(5)
    four, five = ([_behind("Sum it up.", row, "x") for row in rows[:count]] for count in (4, 5))
    same = [_behind("Sum it up.", rows[0], str(at)) for at in range(9)]
    assert own(four).prompt(four[0]) == own(same).prompt(four[0]) == Own().prompt(four[0])
    assert own(five).prompt(five[0]) == five[0]["input"]
    assert own(five).prompt({"instruction": "Sum it up.", "input": ""}) == "Sum it up."


def test_a_step_that_drops_more_than_half_is_said(
    tmp_path: Path, run: Any, made: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tools.write(tmp_path / "data.jsonl", [made(1)[0]] * 5 + made(3))
    with caplog.at_level(logging.WARNING):
        run()
    assert "the step 'exact duplicates' drops 5 of 8 records" in caplog.text
