"""The dataset: splits, balance, coverage, its card, and that it is whole, versioned and the same each time."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune import revisions

SOURCE = '[[sources]]\npath = "data.jsonl"\n'
SPLITS = ("train", "validation", "test")


def _labelled(rows: list[dict[str, Any]], counts: dict[str, int]) -> list[dict[str, Any]]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]


def test_the_same_inputs_are_one_version_and_force_makes_the_same_bytes(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    tools.write(tmp_path / "data.jsonl", made(50))
    first, again, forced = run(SOURCE), run(SOURCE), run(SOURCE, force=True)
    assert (first.new, again.new, forced.new) == (True, False, True)
    assert [done.path.name for done in (first, again, forced)] == ["1", "1", "2"]
    assert first.card["splits"] == forced.card["splits"]
    assert {done.name for done in (tmp_path / "out" / "made").iterdir()} == {"1", "2"}
    assert run(f"seed = 5\n{SOURCE}").card["splits"] != first.card["splits"]


def test_another_revision_of_the_code_is_another_version(
    tmp_path: Path, run: Any, made: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.write(tmp_path / "data.jsonl", made(20))
    first = run(SOURCE)
    monkeypatch.setitem(revisions.REVISIONS, revisions.DATA, revisions.REVISIONS[revisions.DATA] + 1)
    assert (run(SOURCE).new, run(SOURCE).new) == (True, False)
    monkeypatch.undo()
    assert run(SOURCE).path == first.path


def test_what_the_data_come_to_is_what_their_revision_came_to(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    """Where this fails, the same inputs come to other records now: raise the number, and write the new hash here."""
    rows = made(60)
    leaks = [{"instruction": row["instruction"]} for row in rows[:3]]
    tools.write(tmp_path / "exam.jsonl", leaks)
    near = [{**row, "output": row["output"] + " Truly."} for row in rows[3:9]]
    mail = [{"instruction": "Whom do I ask?", "output": "Write to ann@example.org, who knows."}]
    tools.write(
        tmp_path / "data.jsonl", [{**row, "label": "ab"[n % 3 == 0]} for n, row in enumerate(rows + near + mail)]
    )
    done = run(
        f'{SOURCE}[contamination]\nagainst = ["exam.jsonl"]\n[balance]\nmethod = "oversample"\n'
        '[filters]\nlanguages = ["en"]\n[personal_data]\nmask = ["email"]\n'
    )
    hashes = json.dumps({name: split["sha256"] for name, split in done.card["splits"].items()}, sort_keys=True)
    found = (revisions.REVISIONS[revisions.DATA], hashlib.sha256(hashes.encode()).hexdigest()[:16])
    assert found == (1, "a9c15ad2a5451dcb")


@pytest.mark.parametrize(
    ("shares", "said"),
    [("validation = 0.2\ntest = 0.0", ""), ("validation = 0.19\ntest = 0.01", "no record falls to test")],
)
def test_a_split_without_a_record_is_no_file(
    shares: str, said: str, tmp_path: Path, run: Any, made: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tools.write(tmp_path / "data.jsonl", made(20))
    done = run(f"{SOURCE}[split]\ntrain = 0.8\n{shares}\n")
    assert set(done.card["splits"]) == {"train", "validation"}
    assert not (done.path / "test.jsonl").exists()
    assert said in caplog.text and ("no record falls" in caplog.text) is bool(said)


def test_a_changed_source_is_a_new_version_and_a_damaged_version_is_not_taken(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    tools.write(tmp_path / "data.jsonl", made(30))
    first = run(SOURCE)
    tools.write(tmp_path / "data.jsonl", made(31))
    assert run(SOURCE).path.name == "2"
    tools.write(tmp_path / "data.jsonl", made(30))
    with (first.path / "train.jsonl").open("a") as stream:
        stream.write("{}\n")
    assert run(SOURCE).path.name == "3"


def test_the_card_says_what_lies_there(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", [*made(50), made(1)[0]])
    done = run(SOURCE, pictures=True)
    card = json.loads((done.path / "dataset.json").read_text("utf-8"))
    assert card == done.card
    for split in card["splits"].values():
        file = done.path / split["file"]
        assert (sha256_of(file), file.stat().st_size) == (split["sha256"], split["bytes"])
        assert len(tools.read(file)) == split["records"]
    assert card["sources"][0]["sha256"] == sha256_of(tmp_path / "data.jsonl")
    counts = [(stage["before"], stage["after"]) for stage in card["stages"]]
    assert counts[0] == (51, 51)
    assert all(after == before for (_, after), (before, _) in itertools.pairwise(counts))
    assert counts[-1][1] == sum(split["records"] for split in card["splits"].values()) == 50
    readme = (done.path / "README.md").read_text("utf-8")
    for picture in done.path.glob("plots/*.svg"):
        assert f"plots/{picture.name}" in readme
    assert {"steps.svg", "lengths.svg"} <= {picture.name for picture in done.path.glob("plots/*")}
    assert not (done.path / ".work").exists()
    assert str(tmp_path) not in json.dumps(card)


def test_hugging_faces_library_loads_the_folder(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    import datasets

    tools.write(tmp_path / "data.jsonl", made(40))
    for form in ("jsonl", "parquet"):
        done = run(f'format = "{form}"\n{SOURCE}')
        loaded = datasets.load_dataset(str(done.path), cache_dir=str(tmp_path / "cache"))
        assert {name: len(loaded[name]) for name in loaded} == {
            name: split["records"] for name, split in done.card["splits"].items()
        }
        assert set(loaded["train"]["output"]) <= {row["output"] for row in made(40)}


def test_shares_hold_within_each_label(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", _labelled(made(200), {"big": 150, "small": 46, "tiny": 4}))
    done = run(SOURCE)
    found = {name: Counter(record["label"] for record in tools.read(done.path / f"{name}.jsonl")) for name in SPLITS}
    assert found["test"]["big"] == found["validation"]["big"] == 15
    assert found["test"]["small"] in (4, 5) and found["validation"]["small"] in (4, 5)
    assert done.card["coverage"]["classes"]["tiny"]["train"] == found["train"]["tiny"] >= 3
    assert any("tiny" in line and "fewer than" in line for line in done.card["coverage"]["thin"])


def test_oversampling_repeats_evenly_up_to_its_cap_and_only_in_train(
    tmp_path: Path, run: Any, made: Any, tools: Any
) -> None:
    tools.write(tmp_path / "data.jsonl", _labelled(made(100), {"big": 60, "middle": 30, "rare": 10}))
    done = run(f'{SOURCE}[balance]\nmethod = "oversample"\ncap = 3\n')
    train = tools.read(done.path / "train.jsonl")
    counts = Counter(record["label"] for record in train)
    assert counts["big"] == counts["middle"] == 48
    assert counts["rare"] == 3 * len({record["output"] for record in train if record["label"] == "rare"})
    times = Counter(record["output"] for record in train if record["label"] == "middle")
    assert max(times.values()) - min(times.values()) <= 1
    assert sum(record.get("oversampled", False) for record in train) == done.card["balance"]["added"]
    elsewhere = [record for name in SPLITS[1:] for record in tools.read(done.path / f"{name}.jsonl")]
    assert not {record["output"] for record in elsewhere} & set(times)
    assert max(Counter(record["output"] for record in elsewhere).values()) == 1


def test_weights_are_balanced_and_their_mean_is_one(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", _labelled(made(80), {"big": 60, "small": 20}))
    train = tools.read(run(f'{SOURCE}[balance]\nmethod = "weights"\n').path / "train.jsonl")
    sums = Counter(dict.fromkeys(("big", "small"), 0.0))
    for record in train:
        sums[record["label"]] += record["weight"]
    assert sums["big"] == pytest.approx(sums["small"], rel=1e-4)
    assert sum(sums.values()) == pytest.approx(len(train), rel=1e-4)


def test_balancing_one_class_or_none_is_refused(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", _labelled(made(20), {"only": 20}))
    with pytest.raises(UsageError, match="every training record has the label 'only'"):
        run(f'{SOURCE}[balance]\nmethod = "oversample"\n')
    tools.write(tmp_path / "data.jsonl", made(20))
    with pytest.raises(UsageError, match="no record has a label"):
        run(f'{SOURCE}[balance]\nmethod = "weights"\n')
    assert not (tmp_path / "out" / "made").exists()


def test_topics_tell_subjects_apart_and_thin_ones_are_named(tmp_path: Path, run: Any, tools: Any, made: Any) -> None:
    bread = ["Bake {} flour dough into bread how?", "Is {} bread dough flour?", "May {} bread be flour and dough?"]
    ride = [
        "Mend a {} bicycle wheel and chain how?",
        "Is a {} bicycle chain a wheel?",
        "May a {} bicycle wheel chain rust?",
    ]
    prompts = [text.format(kind) for _ in range(3) for kind in ("rye", "spelt", "oat", "barley") for text in bread]
    prompts += [text.format(kind) for kind in ("child's", "racing", "folding", "rusty") for text in ride]
    rows = [{**row, "instruction": prompt} for row, prompt in zip(made(48), prompts, strict=True)]
    tools.write(tmp_path / "data.jsonl", rows)
    coverage = run(f"{SOURCE}[duplicates]\nnear = 1\n[coverage]\ntopics = 2\nthin = 20\n").card["coverage"]
    large, small = coverage["topics"]
    assert (large["records"], small["records"]) == (36, 12)
    assert "bread" in large["words"] and "bicycle" in small["words"]
    assert any("bicycle" in line for line in coverage["thin"])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", made(400))
    (tmp_path / "data.toml").write_text(f'name = "made"\n{SOURCE}', "utf-8")
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
        "from stillhouse.cli.main import run\n"
        "sys.exit(run(['data', 'prepare', 'data.toml', '--output', 'out', '--quiet']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    error, hint = done.stderr.strip().splitlines()
    assert error.startswith("error: cannot write the dataset into out/made: ")
    assert "disk space" in hint
    assert not (tmp_path / "out" / "made").exists()


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", made(20))
    left = tmp_path / "out" / "made" / ".new-abc"
    left.mkdir(parents=True)
    run(SOURCE)
    assert [entry.name for entry in (tmp_path / "out" / "made").iterdir()] == ["1"]


def test_the_command_prints_the_steps_or_json(tmp_path: Path, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", [*made(30), made(1)[0]])
    (tmp_path / "data.toml").write_text(f'name = "made"\n{SOURCE}', "utf-8")
    command = [sys.executable, "-m", "stillhouse.cli.main", "data", "prepare", "data.toml", "--output", "out"]
    table = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "exact duplicates" in table.stdout and "dataset: out/made/1" in table.stdout
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert json.loads(again.stdout)["new"] is False


def test_too_few_records_for_a_split_are_named_thin(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", made(3))
    done = run(SOURCE)
    assert done.card["splits"]["train"]["records"] == 3
    assert "test has no record" in done.card["coverage"]["thin"]


def test_all_in_one_group_is_all_for_training(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", [{**row, "group": "one"} for row in made(20)])
    assert run(SOURCE).card["splits"]["train"]["records"] == 20


def test_an_unwritable_place_is_one_line(tmp_path: Path, run: Any, made: Any, tools: Any) -> None:
    tools.write(tmp_path / "data.jsonl", made(5))
    (tmp_path / "out").write_text("a file where the folder should be", "utf-8")
    with pytest.raises(StillhouseError, match="cannot write the dataset"):
        run(SOURCE)
