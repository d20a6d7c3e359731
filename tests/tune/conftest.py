"""A tiny data set, and the tiny base tuned on it once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.tune.finetune import tune
from stillhouse.tune.settings import load_tune_recipe

Recipe = Callable[..., Path]
PIPELINE = """
[data]
[[data.sources]]
path = "raw.jsonl"
[tune]
r = 4
epochs = 1
[evaluate]
records = "heldout.jsonl"
better = ["records_perplexity"]
"""
ROW = json.dumps({"instruction": "What is six?", "input": "", "output": "The number 6."}) + "\n"
FAST = "epochs = 4\nbatch_size = 4\nlearning_rate = 5e-3\nr = 4\nalpha = 8"


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Torch on one thread: the tiny base needs no more, and threads that wait for others cost minutes under load."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 records to train on, 12 to validate and 12 to test on: what a word's number is."""
    folder = tmp_path_factory.mktemp("dataset")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    rows = [
        {"instruction": f"{ask} {word}?", "input": "", "output": f"The number {at} is what {word} means."}
        for ask in ("What is", "Which number is", "Tell me the value of", "How much is", "Translate", "Count")
        for at, word in enumerate(words)
    ]
    for split, part in (("train", rows[:48]), ("validation", rows[48:60]), ("test", rows[60:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    return folder


@pytest.fixture(scope="session")
def write_tune_recipe(tiny_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Writes a recipe.toml with a table [tune] on the tiny base; relative paths are of its own folder."""

    def write(settings: str = FAST, *, base: Path = tiny_base, data: str | None = None) -> Path:
        file = tmp_path_factory.mktemp("tune") / "recipe.toml"
        named = f'data = "{dataset}"' if data is None else data
        file.write_text(f'name = "tiny"\nbase = "{base}"\n[tune]\n{named}\n{settings}\n', "utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def tuned(one_thread: None, write_tune_recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """The tiny base, tuned once without interruption: the adapter's folder and its card."""
    assert one_thread is None
    done = tune(load_tune_recipe(write_tune_recipe()))
    assert done is not None and done[2]
    return done[0], done[1]


@pytest.fixture
def write(tmp_path: Path, tiny_base: Path) -> Callable[..., Path]:
    """Writes a recipe of a whole pipeline beside its files: its `tables`, and `more` of them behind these."""
    for name in ("raw", "heldout", "train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(ROW * 3, "utf-8")

    def write_recipe(tables: str = PIPELINE, *, more: str = "", top: str = 'precisions = ["fp16", "int8"]\n') -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n{top}{tables}{more}', "utf-8")
        return file

    return write_recipe
