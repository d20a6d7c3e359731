"""A result is replaced whole: whatever fails or is killed in between, the earlier one or the new one is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.engine.errors import UsageError
from stillhouse.tune import replacing
from stillhouse.tune.prune import prune
from stillhouse.tune.prune_options import prune_options
from stillhouse.tune.settings import load_tune_recipe


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "card.json").write_text(text, "utf-8")
    return path


def names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def said(output: Path) -> str:
    return (output / "card.json").read_text("utf-8")


def test_the_new_one_stands_and_the_earlier_one_is_gone(tmp_path: Path) -> None:
    output = folder(tmp_path / "adapter", "old")
    replacing.put(folder(tmp_path / "made", "new"), output)
    assert said(output) == "new"
    assert names(tmp_path) == ["adapter"]


def test_where_the_rename_fails_the_earlier_one_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder(tmp_path / "adapter", "old")
    made = folder(tmp_path / "made", "new")
    real = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path == made:
            raise OSError("no such luck")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no such luck"):
        replacing.put(made, output)
    assert said(output) == "old"
    assert names(tmp_path) == ["adapter", "made"]


def test_killed_between_the_renames_the_next_run_puts_the_earlier_one_back(tmp_path: Path) -> None:
    output = folder(tmp_path / "adapter", "old")
    made = folder(tmp_path / "made", "new")
    dies = f"import pathlib; real = pathlib.Path.rename; made = pathlib.Path({str(made)!r})\n"
    dies += "pathlib.Path.rename = lambda path, to: os._exit(9) if path == made else real(path, to)\n"
    dies += f"from stillhouse.tune import replacing; replacing.put(made, pathlib.Path({str(output)!r}))"
    assert subprocess.run([sys.executable, "-c", "import os; " + dies], check=False).returncode == 9
    assert not output.exists()
    replacing.restore(output)
    assert said(output) == "old"


def test_killed_behind_the_renames_the_next_run_clears_the_earlier_one(tmp_path: Path) -> None:
    output = folder(tmp_path / "adapter", "new")
    folder(tmp_path / ".adapter-old", "old")
    replacing.restore(output)
    assert said(output) == "new"
    assert names(tmp_path) == ["adapter"]


def test_what_is_no_result_is_never_replaced(tmp_path: Path) -> None:
    output = folder(tmp_path / "adapter", "a card")
    replacing.hold_replaceable(output, "card.json", "stillhouse tune")
    replacing.hold_replaceable(tmp_path / "nothing", "card.json", "stillhouse tune")
    with pytest.raises(UsageError, match="no result of stillhouse prune"):
        replacing.hold_replaceable(output, "prune.json", "stillhouse prune")


def test_forced_to_prune_onto_its_own_base_it_refuses_and_the_base_stays(tmp_path: Path) -> None:
    from stillhouse.build.recipe import load_recipe

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}", "utf-8")
    (tmp_path / "train.jsonl").write_text("", "utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "own"\nbase = "base"\n[tune]\ntrain = "train.jsonl"\npatience = 0\n', "utf-8")
    options = prune_options({"output": "base"}, recipe)
    with pytest.raises(UsageError, match="no result of stillhouse prune"):
        prune(load_recipe(recipe), load_tune_recipe(recipe), options, force=True)
    (base / "prune.json").write_text("{}", "utf-8")  # a base that was pruned once itself
    with pytest.raises(UsageError, match=r"prune\.output is the base"):
        prune(load_recipe(recipe), load_tune_recipe(recipe), options, force=True)
    assert (base / "config.json").is_file()
