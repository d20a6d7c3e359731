"""Evaluation files: read like sources, and what they ask is found in whatever form the data has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.contamination import drop_contaminated
from stillhouse.tune.data_recipe import Contamination, DataRecipe, Source, load_data_recipe
from stillhouse.tune.measured import prompts_of, read_measured
from stillhouse.tune.own_texts import own_of
from stillhouse.tune.store import Store

SHORT = [
    "How long is the warranty?", "Do you sell skis?", "Can I pay by card?", "Where is my parcel?",
    "Do boots run small?", "Have you got gas canisters?", "Is there parking?", "Who repairs tents?",
]  # fmt: skip
AGAINST = '[[sources]]\npath = "data.jsonl"\n[contamination]\nagainst = '


def _chat(*texts: str, system: str = "You help. Be brief.") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *turns]}


def _leaks(folder: Path, data: list[dict[str, Any]], exam: list[dict[str, Any]]) -> list[int]:
    """Which of `data` are dropped for what `exam` asks."""
    (folder / "exam.jsonl").write_text("\n".join(map(json.dumps, exam)), "utf-8")
    against = Contamination(against=[Source(path=str(folder / "exam.jsonl"))])
    recipe = DataRecipe(name="made", sources=[Source(path="data.jsonl")], contamination=against)
    asked = read_measured(recipe, folder / "rejects.jsonl").asked
    with Store(folder, folder / "removed.jsonl") as store:
        for record in data:
            store.add(record if "messages" in record else {"input": "", **record})
        both = [*(record for _, record in store.living()), *(one.record for one in asked)]
        own = own_of(both, recipe.duplicates, folder)
        drop_contaminated(store, prompts_of(asked, own), own, recipe, folder)
        return [number for number in range(len(store)) if not store.alive(number)]


def test_chats_of_the_evaluation_are_found_in_the_data(tmp_path: Path, made: Any) -> None:
    rows = made(20)
    one_turn = [_chat(question, "An answer.") for question in SHORT]
    two_turns = [_chat(rows[at]["instruction"], "Yes.", "And then?", rows[at]["output"]) for at in range(4)]
    data = [*rows[10:], *one_turn, *two_turns]
    assert _leaks(tmp_path, data, one_turn + two_turns) == list(range(10, 22))


@pytest.mark.parametrize(
    "form",
    [
        lambda question: {"instruction": f"Customer question: {question} Please answer politely.", "output": "x"},
        lambda question: {"instruction": "Answer the question of the customer.", "input": question, "output": "x"},
        lambda question: _chat(question, "x", system="You are another assistant, of another shop."),
        lambda question: _chat("Hello!", "Hello, how can I help?", question, "x"),
    ],
    ids=["framed", "input", "system", "last turn"],
)
def test_short_questions_are_found_in_other_forms(form: Any, tmp_path: Path, made: Any) -> None:
    exam = [{"prompt": question, "answer": "x"} for question in SHORT]
    assert _leaks(tmp_path, [*made(6), *map(form, SHORT)], exam) == list(range(6, 14))


def test_what_an_evaluation_has_in_common_with_all_data_leaks_nothing(tmp_path: Path, made: Any) -> None:
    rows = made(30)
    form = "Read what the customer of our shop writes, and say in one word how he or she feels about it: "
    exam = [{"instruction": form + row["instruction"][-40:]} for row in rows[:10]]
    turns = [_chat("Hello!", "Hello.", "Yes, please.", "Here you are.", system=form)]
    data = [{"instruction": form + row["instruction"][-40:], "output": "well"} for row in rows[10:]]
    short = {"instruction": "Yes, please.", "output": "Which one?"}
    assert _leaks(tmp_path, [*data, short, {"instruction": "Hello!", "output": "Hello."}], exam + turns) == []


def test_bad_lines_of_an_evaluation_file_are_listed_and_counted(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    rows = made(20)
    tools.write(tmp_path / "data.jsonl", rows)
    lines = [json.dumps({"prompt": rows[2]["instruction"]}), '{"prompt": "torn', json.dumps({"ask": "what?"})]
    (tmp_path / "exam.jsonl").write_text("\n".join(lines), "utf-8")
    done = run(AGAINST + '["exam.jsonl"]\n')
    assert done.card["measured_on"] == [{"path": "exam.jsonl", "records": 3, "rejected": 2}]
    rejects = tools.read(done.path / "rejects.jsonl")
    assert [(entry["file"], entry["line"]) for entry in rejects] == [("exam.jsonl", 2), ("exam.jsonl", 3)]
    assert "2 records that ask nothing or could not be read" in (done.path / "README.md").read_text("utf-8")


def test_an_evaluation_file_names_its_columns_and_encoding_as_a_source_does(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    rows = made(20)
    tools.write(tmp_path / "data.jsonl", [*rows, {"instruction": "Wie groß ist das Zelt?", "output": "Groß."}])
    (tmp_path / "exam.csv").write_bytes("Frage;Antwort\nWie groß ist das Zelt?;x\n".encode("cp1252"))
    with pytest.raises(StillhouseError, match=r"exam\.csv is not utf-8"):
        run(AGAINST + '["exam.csv"]\n')
    with pytest.raises(StillhouseError, match=r"exam\.csv has no prompt: exam\.csv:2 has no instruction") as raised:
        run(AGAINST + '[{ path = "exam.csv", encoding = "cp1252" }]\n')
    assert "columns" in str(raised.value.hint)
    done = run(AGAINST + '[{ path = "exam.csv", encoding = "cp1252", columns = { instruction = "Frage" } }]\n')
    removed = tools.read(done.path / "removed.jsonl")
    assert [entry["record"]["source"]["line"] for entry in removed] == [21]


def test_what_the_recipe_evaluates_on_is_held_against_without_being_named_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.toml").write_text(
        'name = "made"\n[[sources]]\npath = "raw.jsonl"\n[contamination]\nagainst = ["../held.jsonl"]\n', "utf-8"
    )
    recipe.write_text(
        'name = "made"\ndata = "data/data.toml"\n[evaluate]\nrecords = "held.jsonl"\ntasks = "tasks.jsonl"\n', "utf-8"
    )
    against = load_data_recipe(recipe).contamination.against
    assert [source.path for source in against] == [str(tmp_path / "held.jsonl"), str(tmp_path / "tasks.jsonl")]
