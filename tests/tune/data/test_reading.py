"""Sources of every form give the same records, and what is bad is named by file and line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError, UsageError

BOTH = [
    {"frage": "What does the blue lantern cost?", "antwort": "Nineteen crowns, with the wick and a box of matches."},
    {"frage": "Who repairs torn tents?", "antwort": "The workshop behind the mill does; bring the poles along, too."},
]
COLUMNS = 'columns = { instruction = "frage", output = "antwort" }'


def _csv(file: Path, encoding: str = "utf-8", delimiter: str = ",") -> None:
    with file.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, ["frage", "antwort"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(BOTH)


def _parquet(file: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(BOTH), file)


def _saved(folder: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(BOTH)}).save_to_disk(folder)


WRITERS = {
    "data.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, BOTH)), "utf-8"),
    "data.json": lambda file: file.write_text(json.dumps(BOTH, indent=1), "utf-8"),
    "rows.json": lambda file: file.write_text(json.dumps({"v": 1, "data": BOTH}, indent=1), "utf-8"),
    "lines.json": lambda file: file.write_text("\n".join(map(json.dumps, BOTH)), "utf-8"),
    "data.csv": _csv,
    "semicolons.csv": lambda file: _csv(file, delimiter=";"),
    "marked.csv": lambda file: _csv(file, "utf-8-sig"),
    "wide.csv": lambda file: _csv(file, "utf-16"),
    "wide.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, BOTH)), "utf-16"),
    "wider.jsonl": lambda file: file.write_text("\n".join(map(json.dumps, BOTH)), "utf-32"),
    "data.parquet": _parquet,
    "saved": _saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_gives_the_same_records(name: str, tmp_path: Path, run: Any, tools: Any) -> None:
    WRITERS[name](tmp_path / name)
    done = run(f'[[sources]]\npath = "{name}"\n{COLUMNS}\n')
    found = {(record["instruction"], record["output"]) for record in tools.records(done)}
    assert found == {(row["frage"], row["antwort"]) for row in BOTH}


def test_a_folder_and_a_glob_give_all_their_files(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows = made(8)
    (tmp_path / "many").mkdir()
    tools.write(tmp_path / "many" / "a.jsonl", rows[:4])
    tools.write(tmp_path / "many" / "b.jsonl", rows[4:])
    for path in ("many", "many/*.jsonl"):
        done = run(f'[[sources]]\npath = "{path}"\n')
        assert len(tools.records(done)) == 8
        assert {record["source"]["file"] for record in tools.records(done)} == {"many/a.jsonl", "many/b.jsonl"}


def test_bad_records_are_listed_by_file_and_line_and_the_others_go_on(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    good = [json.dumps(row).encode() for row in made(20)]
    bad = {
        3: b'{"instruction": "cut off',
        5: b'["a list"]',
        8: json.dumps({"instruction": "no answer"}).encode(),
        9: json.dumps({"instruction": "x", "output": "   "}).encode(),
        12: json.dumps({"instruction": 7, "output": "a number as a question"}).encode(),
        15: b'{"instruction": "caf\xe9", "output": "another encoding"}',
        17: json.dumps({"messages": [{"role": "bot", "content": "who?"}]}).encode(),
        18: json.dumps({"messages": [{"role": "user", "content": "and then?"}]}).encode(),
    }
    lines: list[bytes] = []
    while good or any(number > len(lines) for number in bad):
        lines.append(bad.get(len(lines) + 1) or good.pop())
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    done = run('checks = { max_rejected_share = 0.5 }\n[[sources]]\npath = "data.jsonl"\n')
    rejects = tools.read(done.path / "rejects.jsonl")
    assert [(entry["file"], entry["line"]) for entry in rejects] == [("data.jsonl", line) for line in bad]
    words = [
        "not JSON", "not a JSON object", "no output", "empty output", "a number", "not utf-8", "'bot'", "no answer",
    ]  # fmt: skip
    assert all(word in entry["reason"] for word, entry in zip(words, rejects, strict=True))
    assert len(tools.records(done)) == 20
    assert done.card["sources"][0] | {"records": 28, "rejected": 8} == done.card["sources"][0]


def test_a_csv_row_is_named_by_the_line_it_begins_in(tmp_path: Path, run: Any, tools: Any) -> None:
    rows = ['"two\nlines?","yes, two lines of them"', "one field only", "one line?,yes and a comma-free answer"]
    (tmp_path / "data.csv").write_text("instruction,output\n" + "\n".join(rows) + "\n", "utf-8")
    done = run('checks = { max_rejected_share = 0.5 }\n[[sources]]\npath = "data.csv"\n')
    assert [entry["line"] for entry in tools.read(done.path / "rejects.jsonl")] == [4]
    assert sorted(record["source"]["line"] for record in tools.records(done)) == [2, 5]


def test_elements_of_a_json_array_have_their_lines(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    rows = [json.dumps(row, indent=2) for row in made(4)]
    text = "[\n" + ",\n".join([*rows[:2], '{"instruction": "x"}', *rows[2:]]) + "\n]"
    (tmp_path / "data.json").write_text(text, "utf-8")
    done = run('checks = { max_rejected_share = 0.5 }\n[[sources]]\npath = "data.json"\n')
    bad_line = text[: text.index('{"instruction": "x"}')].count("\n") + 1
    assert [entry["line"] for entry in tools.read(done.path / "rejects.jsonl")] == [bad_line]


def test_chats_stay_chats_and_sharegpts_form_is_read(tmp_path: Path, run: Any, tools: Any) -> None:
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Do you ship to islands?"},
        {"role": "assistant", "content": "Yes, on the Tuesday boat."},
    ]
    sharegpt = [{"from": "human", "value": "Is the mill open?"}, {"from": "gpt", "value": "Only in the mornings."}]
    tools.write(tmp_path / "data.jsonl", [{"messages": chat}, {"conversations": sharegpt}])
    found = [record["messages"] for record in tools.records(run())]
    assert chat in found
    assert [
        {"role": "user", "content": "Is the mill open?"},
        {"role": "assistant", "content": "Only in the mornings."},
    ] in found


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b"", "data.jsonl is empty"),
        ("data.jsonl", b"\n\n", "data.jsonl has no record"),
        ("data.csv", b"", "data.csv is empty"),
        ("data.csv", b"instruction,output\n", "data.csv has no record"),
        ("data.csv", b"ask,answer\na,b\n", "data.csv has no column for instruction; it has ask, answer"),
        ("data.csv", "instruction,output\ncafé,thé\n".encode("latin-1"), "data.csv is not utf-8: byte 0xe9 in line 2"),
        ("data.json", b'[{"instruction": "a", "output": "b"}, {"instr', "data.json is not JSON"),
        ("data.parquet", b"PAR1 cut off", "cannot read"),
        ("data.xlsx", b"PK", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    name: str, content: bytes, words: str, tmp_path: Path, run: Any
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StillhouseError) as raised:
        run(f'[[sources]]\npath = "{name}"\n')
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.hint
    assert not (tmp_path / "out" / "made").exists()


def test_a_truncated_parquet_file_is_one_line(tmp_path: Path, run: Any) -> None:
    _parquet(tmp_path / "data.parquet")
    whole = (tmp_path / "data.parquet").read_bytes()
    (tmp_path / "data.parquet").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(StillhouseError, match=r"cannot read .*data\.parquet"):
        run(f'[[sources]]\npath = "data.parquet"\n{COLUMNS}\n')


def test_too_many_bad_records_end_the_run_and_the_list_stays(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", [*made(6), {"text": "x"}, {"text": "y"}, {"text": "z"}])
    with pytest.raises(StillhouseError, match=r"3 of 9 records are bad.*data\.jsonl:7 has no instruction"):
        run()
    assert len(tools.read(tmp_path / "out" / "made" / "rejects.jsonl")) == 3
    assert not list((tmp_path / "out" / "made").glob("[.0-9]*"))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ("", "'sources' is missing"),
        ('[[sources]]\npath = "nowhere.jsonl"', "no such file"),
        ('[[sources]]\npath = "data.jsonl"\nformat = "xml"', "unknown value 'xml'"),
        ('[[sources]]\npath = "data.jsonl"\nencoding = "klingon"', "knows no encoding"),
        ('[[sources]]\npath = "data.jsonl"\n[split]\ntrain = 0.5', "must sum to 1"),
        ('[[sources]]\npath = "data.jsonl"\n[duplicate]\nnear = 0.5', "unknown key 'duplicate'"),
        ('[[sources]]\npath = "data.jsonl"\n[perplexity]\nlow = 2', "no model to score with"),
        ('[[sources]]\npath = "data.jsonl"\n[filters]\nlanguages = ["xx"]', "unknown language 'xx'"),
        ('[[sources]]\npath = "data.jsonl"\n[contamination]\nagainst = ["no.jsonl"]', "no such file"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(
    tables: str, words: str, tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    tools.write(tmp_path / "data.jsonl", made(4))
    with pytest.raises(UsageError) as raised:
        run(tables)
    assert words in str(raised.value)
