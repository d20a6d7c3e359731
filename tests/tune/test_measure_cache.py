"""What was measured once stays: after a kill, for the same base once more, and only where nothing has changed."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build import texts
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune import measure_cache, revisions
from stillhouse.tune.evaluation import evaluate, figures
from stillhouse.tune.evaluation_recipe import load_evaluation

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")

Evaluate = Callable[..., tuple[list[dict[str, Any]], list[str]]]
SPAWN = {"OMP_NUM_THREADS": "1"}  # as `one_thread`, so that every figure is the same to the bit


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that nothing lies in yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "stillhouse"


@pytest.fixture(scope="module")
def recipe(
    tuned: tuple[Path, dict[str, Any]], tiny_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A recipe that measures held-out records and tasks of both forms."""
    folder = tmp_path_factory.mktemp("measured")
    rows = [json.loads(line) for line in (dataset / "test.jsonl").read_text("utf-8").splitlines()]
    tasks: list[dict[str, Any]] = [
        {"prompt": row["instruction"], "answer": row["output"], "max_tokens": 8} for row in rows[:4]
    ]
    tasks += [{"prompt": row["instruction"], "choices": [row["output"], "no"], "answer": 0} for row in rows[:4]]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks), "utf-8")
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    file = folder / "recipe.toml"
    file.write_text(
        f'name = "tiny"\nbase = "{tiny_base}"\nadapters = ["{tuned[0]}"]\n'
        '[evaluate]\nrecords = "records.jsonl"\ntasks = "tasks.jsonl"\n',
        "utf-8",
    )
    return file


@pytest.fixture
def evaluated(recipe: Path, caplog: pytest.LogCaptureFixture) -> Evaluate:
    """Evaluates the recipe with changes; its figures, and what was said of each model."""

    def run(*changes: str, no_cache: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
        caplog.clear()
        with caplog.at_level(logging.INFO, measure_cache.__name__):
            rows = figures(evaluate(load_evaluation(recipe, changes), [], no_cache=no_cache))
        return rows, [each.getMessage() for each in caplog.records if each.name == measure_cache.__name__]

    return run


@pytest.mark.slow
def test_killed_after_the_first_model_it_measures_the_rest_to_the_figures_of_an_uninterrupted_run(
    recipe: Path, evaluated: Evaluate, own_cache: Path
) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "evaluate", str(recipe), "--no-versions"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | SPAWN) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if "measuring: base" in line:
                child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL, said
    assert list((own_cache / "scratch").iterdir())  # what it was in the middle of
    rows, said = evaluated()
    assert said == ["measured before: tuned", "measuring: base"]
    assert not list((own_cache / "scratch").iterdir())
    uninterrupted, said = evaluated(no_cache=True)
    assert said == ["measuring: tuned", "measuring: base"]
    assert rows == uninterrupted
    assert evaluated() == (rows, ["measured before: tuned", "measured before: base"])


@pytest.mark.slow
def test_only_what_was_changed_is_measured_again(
    recipe: Path, evaluated: Evaluate, tuned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LEAST_TOKENS", 1_000)
    whole, _ = evaluated()
    half, said = evaluated(f'adapters=[{{path="{tuned[0]}", weight=0.5}}]')
    assert said == ["measuring: tuned", "measured before: base"]
    assert half[0] == whole[0] and half[1]["records_perplexity"] != whole[1]["records_perplexity"]
    assert evaluated("adapters=[]") == (whole[:1], ["measured before: base"])

    both = ["measuring: tuned", "measuring: base"]
    for name in ("tasks", "records"):  # one task, and one record, fewer
        lines = (recipe.parent / f"{name}.jsonl").read_text("utf-8").splitlines(keepends=True)
        fewer = recipe.parent / f"fewer-{name}.jsonl"
        fewer.write_text("".join(lines[1:]), "utf-8")
        assert evaluated(f'evaluate.{name}="{fewer}"')[1] == both
    prose = recipe.parent / "prose.txt"
    prose.write_text("One sentence of another text, again and again. " * 400, "utf-8")
    assert evaluated(f'evaluate.text="{prose}"')[1] == both
    monkeypatch.setitem(revisions.REVISIONS, revisions.MEASURED, revisions.REVISIONS[revisions.MEASURED] + 1)
    assert evaluated()[1] == both


def test_a_cache_that_cannot_be_written_is_named(
    evaluated: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StillhouseError, match="cannot write into the cache") as refused:
        evaluated()
    assert refused.value.hint == "set XDG_CACHE_HOME to another folder"
