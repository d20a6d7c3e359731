"""One recipe makes the table of stages; what is wrong in it is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run as command
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import TamperedError
from stillhouse.tune import revisions
from stillhouse.tune.stages import Stage, stages_of

TUNE = "[tune]\nr = 4\nepochs = 1\n"
DATA = '[data]\n[[data.sources]]\npath = "raw.jsonl"\n'
EVALUATE = '[evaluate]\nrecords = "heldout.jsonl"\nbetter = ["records_perplexity"]\n'
ROW = json.dumps({"instruction": "What is six?", "input": "", "output": "The number 6."}) + "\n"

Write = Callable[..., Path]


MANIFEST: dict[str, Any] = {
    "schema": 1, "name": "tiny", "model": "tiny-fp16", "version": 1, "precision": "fp16", "target": "cpu",
    "created": "2026-01-01T00:00:00Z", "inputs_sha256": "0", "base": {"id": "b", "sha256": "0"}, "recipe": {},
    "tools": {}, "memory": {"weights_bytes": 5, "kv_bytes_per_token": 64},
    "network": {
        "architecture": "llama", "layers": 1, "hidden_size": 8, "heads": 1, "kv_heads": 1, "head_dim": 8,
        "vocab_size": 16, "context_length": 32, "eos_token_ids": [2],
    },
}  # fmt: skip


def stages(recipe: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(recipe, recipe.parent / "repository")}


def test_the_tables_of_a_recipe_say_which_stages_there_are(write: Write) -> None:
    assert list(stages(write())) == ["data", "tune", "evaluate", "build", "precisions"]
    own = TUNE + 'train = "train.jsonl"\nvalidation = "validation.jsonl"\n' + EVALUATE
    assert list(stages(write(own))) == ["tune", "evaluate", "build", "precisions"]
    more = "[prune]\nheads = 0.5\n[pipeline]\nprune = true\npromote = 'grpc://127.0.0.1:1'\n"
    whole = stages(write(more=more))
    named = ["data", "tune", "evaluate", "prune", "build", "precisions", "promote-tiny-fp16", "promote-tiny-int8"]
    assert list(whole) == named
    assert whole["build"].after == ("prune",)
    # What was pruned is the base of what was built, and its own gate was held before.
    assert {"base={prune}/pruned", "adapters=[]", "evaluate.better=[]", "{build}"} <= set(whole["precisions"].arguments)
    assert {"base={prune}/pruned", "adapters=[]", "--keep-live"} <= set(whole["build"].arguments)
    assert whole["prune"].reads["evaluate.better"] == ["records_perplexity"]  # it is held to the gate, too


def test_whatever_moves_the_live_version_is_done_only_while_nothing_else_moved_it(write: Write) -> None:
    table = stages(write())
    assert {name for name, stage in table.items() if stage.moves} == {"build"}
    assert "--live" in table["build"].arguments
    table = stages(write(more="[pipeline]\npromote = 'grpc://127.0.0.1:1'\n"))
    assert {name for name, stage in table.items() if stage.moves} == {"promote-tiny-fp16", "promote-tiny-int8"}


def test_another_version_of_a_tool_makes_a_stage_run_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed_with(tool: str) -> set[str]:
        before = stages(write())
        with monkeypatch.context() as patch:
            patch.setattr(revisions, "version", lambda name: "0.0" if name == tool else version(name))
            after = stages(write())
        return {name for name in after if after[name].reads != before[name].reads}

    assert changed_with("peft") == {"tune", "evaluate", "build", "precisions"}
    assert changed_with("onnxruntime") == {"evaluate", "build", "precisions"}
    assert changed_with("ftfy") == {"data"}


@pytest.mark.parametrize(
    ("kind", "touched"),
    [
        ("data", {"data"}),
        ("tune", {"tune", "prune"}),
        ("prune", {"prune"}),
        ("measured", {"evaluate", "prune", "precisions"}),
    ],
)
def test_another_revision_of_the_code_makes_what_it_comes_to_anew(
    kind: str, touched: set[str], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(more="[prune]\nheads = 0.5\n[pipeline]\nprune = true\n")
    before = stages(recipe)
    monkeypatch.setitem(revisions.REVISIONS, kind, revisions.REVISIONS[kind] + 1)
    after = stages(recipe)
    assert {name for name in after if after[name].reads != before[name].reads} == touched


def test_a_version_whose_files_were_changed_is_no_result_of_a_build(write: Write, tmp_path: Path) -> None:
    made = tmp_path / "tiny-fp16" / "1"
    made.mkdir(parents=True)
    (made / "model.onnx").write_bytes(b"model")
    file = {"path": "model.onnx", "bytes": 5, "sha256": sha256_of(made / "model.onnx")}
    (made / "manifest.json").write_text(json.dumps(MANIFEST | {"files": [file]}), "utf-8")
    (tmp_path / "build.json").write_text(json.dumps({"results": [{"path": str(made)}]}))
    build = stages(write())["build"]
    assert build.result(tmp_path) == [made / "manifest.json"]
    (made / "model.onnx").write_bytes(b"MODEL")
    with pytest.raises(TamperedError):
        build.result(tmp_path)


def test_a_recipe_may_name_the_datas_recipe_or_hold_it(write: Write) -> None:
    held = stages(write())["data"]
    (write().parent / "data.toml").write_text('name = "tiny"\n[[sources]]\npath = "raw.jsonl"\n')
    named = stages(write(TUNE + EVALUATE, top='data = "data.toml"\n'))["data"]
    assert named.reads["sources"] == held.reads["sources"]


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ("raw", {"data"}),
        ("heldout", {"data", "evaluate", "precisions"}),  # what it asks is kept out of the data
        ("epochs", {"tune"}),
        ("better", {"evaluate"}),
        ("precisions", {"build"}),
        ("base", {"tune", "evaluate", "build", "precisions"}),
        ("comment", set()),
    ],
)
def test_a_change_touches_only_the_stages_that_read_it(
    change: str, touched: set[str], write: Write, tiny_base: Path, tmp_path: Path
) -> None:
    before = stages(write())
    recipe = write()
    text = recipe.read_text("utf-8")
    if change in ("raw", "heldout"):
        (tmp_path / f"{change}.jsonl").write_text(ROW * 4, "utf-8")
    edits = {
        "epochs": ("epochs = 1", "epochs = 2"),
        "better": ('["records_perplexity"]', "[]"),
        "precisions": ('["fp16", "int8"]', '["fp16"]'),
        "comment": ("[tune]", "# more\n[tune]"),
    }
    if change == "base":
        other = tmp_path / "other"
        shutil.copytree(tiny_base, other)
        (other / "generation_config.json").write_text("{}")
        text = text.replace(str(tiny_base), str(other))
    recipe.write_text(text.replace(*edits.get(change, ("", ""))), "utf-8")
    after = stages(recipe)
    assert {name for name in after if after[name].reads != before[name].reads} == touched


@pytest.mark.parametrize(
    ("more", "top", "words"),
    [
        (EVALUATE, "", "'tune' is missing"),
        (TUNE + EVALUATE, "", "no data"),
        (DATA + TUNE + 'data = "."\n' + EVALUATE, "", "tune.data names another"),
        (DATA + TUNE + EVALUATE, 'adapters = ["mine"]\n', "the pipeline builds the adapter that it tunes"),
        (DATA + TUNE + '[evaluate]\nrecords = "heldout.jsonl"\nbetter = ["loss"]\n', "", "unknown value 'loss'"),
        (DATA + TUNE + EVALUATE.replace("records_perp", "general_perp"), "", "gates general_perplexity, but names no"),
        (DATA + TUNE + EVALUATE + "[pipeline]\npromote = true\n", "", "pipeline.promote"),
        (DATA + TUNE + EVALUATE + '[pipeline]\npromote = "http://x"\n', "", "pipeline.promote"),
        (DATA + TUNE + EVALUATE + '[pipeline]\npromote = "grpc://x:y"\n', "", "pipeline.promote: the port must be"),
        (DATA + TUNE + EVALUATE + '[pipeline]\npromote = "grpc://{x}/y"\n', "", "pipeline.promote: a gRPC address"),
        (DATA + EVALUATE, "tune = 3\n", "cannot set tune.data: tune is no table"),
        (DATA + TUNE + EVALUATE + "[pipeline]\nstages = []\n", "", "unknown key 'pipeline.stages'"),
        (DATA + TUNE + EVALUATE + "[prune]\nhead = 1\n[pipeline]\nprune = true\n", "", "unknown key 'prune.head'"),
        (DATA.replace("raw", "no") + TUNE + EVALUATE, "", "no such file"),
        (DATA + "[data.split]\ntrain = 0.5\n" + TUNE + EVALUATE, "", "data.split: train, validation and test must"),
        (TUNE + EVALUATE, 'data = "nowhere.toml"\n', "no recipe at"),
        (TUNE + EVALUATE, "data = 3\n", "data: "),
        (DATA + TUNE + EVALUATE + "[[tune]]\n", "", "is not TOML"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_one_line(
    more: str, top: str, words: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(more, top=top)
    assert command(["pipeline", str(recipe), "--output", str(recipe.parent / "runs")]) in (1, 2)
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and words in error
    assert hint.startswith("hint: ")
    assert not (recipe.parent / "runs").exists()


def test_a_dry_run_says_what_would_run_and_why_and_does_nothing(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write()
    assert command(["pipeline", str(recipe), "--dry-run", "--output", str(recipe.parent / "runs")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data: would run: not done yet",
        "tune: would run: reads the result of data",
        "evaluate: would run: reads the result of data, tune",
        "build: would run: reads the result of tune",
        "precisions: would run: reads the result of build, data, tune",
    ]
    assert not (recipe.parent / "runs").exists()
