"""Sources as they are found: quotes that close nowhere, folders of the hub, several arrays, values that JSON lacks."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.data_recipe import Source
from stillhouse.tune.raw import Bad
from stillhouse.tune.readers import read_source
from stillhouse.tune.records import BadRecord, Mapping
from stillhouse.tune.source_files import files_of


def _read(file: Path, **options: Any) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The records, and the bad ones by line."""
    found = list(read_source(Source(path=str(file), **options)))
    return (
        [raw for _, raw in found if not isinstance(raw, Bad)],
        {place.line: raw.reason for place, raw in found if isinstance(raw, Bad)},
    )


@pytest.mark.parametrize("quoted", [False, True], ids=["plain", "quoted"])
def test_a_quote_that_closes_nowhere_costs_its_own_row(quoted: bool, tmp_path: Path) -> None:
    mark = '"' if quoted else ""
    rows = [f"{mark}question {at}{mark},{mark}answer {at}{mark}" for at in range(50)]
    rows[20] = 'question 20,"answer 20'
    rows[30] = 'question 30,"answer\nof two lines"'
    (tmp_path / "data.csv").write_text("instruction,output\n" + "\n".join(rows) + "\n", "utf-8")
    records, bad = _read(tmp_path / "data.csv")
    assert list(bad) == [22]
    assert [record["instruction"] for record in records] == [f"question {at}" for at in range(50) if at != 20]


def test_a_header_with_such_a_quote_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('instruction,"output\na,b\n', "utf-8")
    with pytest.raises(StillhouseError, match="has a header that is not CSV"):
        _read(tmp_path / "data.csv")


def test_a_table_of_chats_and_of_instructions_has_nulls_in_either_column(tmp_path: Path, run: Any, made: Any) -> None:
    rows = made(40)
    turns = [{"role": "user", "content": rows[0]["instruction"]}, {"role": "assistant", "content": rows[0]["output"]}]
    mapping = Mapping(Source(path="x"))
    chat = {"instruction": None, "input": None, "output": None, "messages": turns}
    assert mapping.record(chat) == mapping.asked(chat) == {"messages": turns}
    assert mapping.record({**rows[1], "messages": None}) == rows[1]
    with pytest.raises(BadRecord, match="has no output"):
        mapping.record({**rows[1], "output": None, "messages": None})
    with pytest.raises(BadRecord, match="messages that are null"):
        mapping.record({"messages": None})
    # Such a table is what a dataset of ours is in Parquet.
    chats = [
        {"messages": [turns[0] | {"content": row["instruction"]}, turns[1] | {"content": row["output"]}]}
        for row in rows[2:]
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*chats, *rows[:2]])), "utf-8")
    first = run('format = "parquet"\n[[sources]]\npath = "data.jsonl"\n')
    again = run(f'[[sources]]\npath = "{first.path}"\n')
    assert again.card["stages"][0] == {"stage": "read", "before": 40, "after": 40}


def test_a_turn_that_calls_tools_is_no_text_and_parts_of_text_are_one() -> None:
    mapping = Mapping(Source(path="x"))
    asks, says = {"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "It is."}
    parts = [{"type": "text", "text": "Is it"}, {"type": "text", "text": "raining?"}]
    assert mapping.record({"messages": [{"role": "user", "content": parts}, says]})["messages"] == [
        {"role": "user", "content": "Is it\nraining?"}, says,
    ]  # fmt: skip
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(BadRecord, match="that is a list"):
        mapping.record({"messages": [{"role": "user", "content": image}, says]})
    assert mapping.record({"messages": [asks, says | {"tool_calls": None}]}) == {"messages": [asks, says]}
    for calls in ({"tool_calls": [{"id": "1"}], "content": None}, {"function_call": {"name": "rain"}}):
        with pytest.raises(BadRecord, match=r"messages\[1\] that calls tools"):
            mapping.record({"messages": [asks, says | calls, {"role": "tool", "content": "yes"}, says]})


def test_two_columns_of_one_name_are_one_line_and_nameless_ones_are_none(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("instruction,output,,\na,b,,\n", "utf-8")
    assert len(_read(tmp_path / "data.csv")[0]) == 1
    (tmp_path / "data.csv").write_text("instruction,output,output\na,b,c\n", "utf-8")
    with pytest.raises(StillhouseError, match="has two columns called 'output'"):
        _read(tmp_path / "data.csv")


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", "utf-8")


def test_a_folder_as_the_hub_lays_it_out_is_read_and_splits_are_told_apart(tmp_path: Path) -> None:
    _touch(
        tmp_path, "README.md", "dataset_infos.json", ".cache/old.json", "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet", "extra/train/0000.parquet", "extra/pretrained.jsonl",
    )  # fmt: skip

    def names(split: str | None) -> list[str]:
        return [file.name for file in files_of(Source(path=str(tmp_path), split=split))]

    assert names("train") == ["train-00000-of-00001.parquet", "0000.parquet"]
    assert len(names(None)) == 4
    with pytest.raises(UsageError, match="no file of records of the split 'validation' in "):
        names("validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no file of records in .*empty") as refused:
        files_of(Source(path=str(tmp_path / "empty")))
    assert ".jsonl" in str(refused.value.hint)


def test_an_earlier_dataset_of_ours_is_its_splits_alone(tmp_path: Path) -> None:
    _touch(tmp_path, "train.jsonl", "dataset.json", "removed.jsonl", "elsewhere/dataset.json")
    for empty in ("rejects.jsonl", "test.jsonl"):
        (tmp_path / empty).write_bytes(b"")
    files = files_of(Source(path=str(tmp_path)))
    assert [str(file.relative_to(tmp_path)) for file in files] == ["elsewhere/dataset.json", "train.jsonl"]


def test_of_several_arrays_the_split_says_which_and_a_record_is_no_wrapper(tmp_path: Path, made: Any) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps({"columns": ["a"], "train": made(3), "test": made(2)}), "utf-8")
    assert len(_read(file, split="test")[0]) == 2
    with pytest.raises(UsageError, match="several arrays: train, test") as raised:
        _read(file)
    assert "split" in str(raised.value.hint)
    one = {"tags": ["a", "b"], **made(1)[0]}
    file.write_text(json.dumps(one), "utf-8")
    assert _read(file)[0] == [one]


@pytest.mark.parametrize(
    ("label", "expected"), [(1.0, "1"), (2, "2"), (True, "True"), (float("nan"), None), (None, None), ("", None)]
)
def test_labels_that_pandas_made_floats_are_whole_numbers_again(label: Any, expected: str | None) -> None:
    record = Mapping(Source(path="x")).record(
        {"instruction": "a", "output": "b", "input": float("nan"), "label": label}
    )
    assert record.get("label") == expected
    assert record["input"] == ""


@pytest.mark.parametrize("odd", ["1" * 5000, "[" * 100_000], ids=["digits", "depth"])
def test_numbers_and_depths_that_json_cannot_read_cost_a_line_or_are_one(odd: str, tmp_path: Path) -> None:
    good = '{"instruction": "a", "output": "b"}'
    (tmp_path / "data.jsonl").write_text(f'{good}\n{{"instruction": "a", "output": "b", "id": {odd}}}\n', "utf-8")
    records, bad = _read(tmp_path / "data.jsonl")
    assert (len(records), list(bad)) == (1, [2])
    assert "not JSON" in bad[2]
    (tmp_path / "data.json").write_text(f"[{good}, {odd}]", "utf-8")
    with pytest.raises(StillhouseError, match=r"data\.json is not JSON: (nested|a number)"):
        _read(tmp_path / "data.json")


@pytest.mark.parametrize(("where", "options"), [("label", {}), ("group", {}), ("note", {"keep": ["note"]})])
def test_half_a_character_anywhere_is_a_bad_record(where: str, options: dict[str, Any]) -> None:
    mapping = Mapping(Source(path="x", **options))
    with pytest.raises(BadRecord, match="half a character"):
        mapping.record({"instruction": "a", "output": "b", where: "\ud800"})


def test_kept_columns_of_parquet_become_what_json_has(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kept = {"date": datetime(2024, 5, 17, 9), "price": Decimal("1.50"), "score": float("nan"), "tags": ["a"]}
    parquet.write_table(pa.Table.from_pylist([row | kept for row in made(4)]), tmp_path / "data.parquet")
    done = run('[[sources]]\npath = "data.parquet"\nkeep = ["date", "price", "score", "tags"]\n')
    record = tools.records(done)[0]
    assert (record["date"], record["price"]) == ("2024-05-17T09:00:00", "1.50")
    assert (record["score"], record["tags"]) == (None, ["a"])
    with pytest.raises(BadRecord, match="column 'photo' that is bytes"):
        Mapping(Source(path="x", keep=["photo"])).record({"instruction": "a", "output": "b", "photo": b"x"})
