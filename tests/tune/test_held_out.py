"""What is held out: splits that hold nothing, records beyond the context, the loss of an answer in two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.recipe import load_recipe
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.text import Tokenizer
from stillhouse.tune.encoding import Encoder, Example
from stillhouse.tune.evaluation import fitting_split
from stillhouse.tune.evaluation_recipe import load_evaluation
from stillhouse.tune.finetune import prepare
from stillhouse.tune.measure import _answer_logits
from stillhouse.tune.settings import TuneOptions, load_tune_recipe
from stillhouse.tune.splits import find_split, read_split
from stillhouse.tune.torch_runner import TorchRunner, load
from stillhouse.tune.training import sentences

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_that_holds_nothing_is_none(split: str, dataset: Path, tiny_base: Path, tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        text = "" if name == split else (dataset / f"{name}.jsonl").read_text("utf-8")
        (tmp_path / f"{name}.jsonl").write_text(text, "utf-8")
    assert find_split(tmp_path, split) is None
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n[tune]\ndata = "{tmp_path}"\n', "utf-8")
    if split == "validation":
        with pytest.raises(StillhouseError, match="early stopping") as refused:
            prepare(load_tune_recipe(recipe))
        assert refused.value.hint is not None and "patience = 0" in refused.value.hint
        recipe.write_text(recipe.read_text("utf-8") + "patience = 0\n", "utf-8")
    else:
        assert load_evaluation(recipe).evaluate.records == str(tmp_path / "validation.jsonl")
    assert split not in prepare(load_tune_recipe(recipe)).sequences


def test_records_beyond_the_context_are_left_out_and_named(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": "What is one?", "output": "1"}, {"instruction": "word " * 5000, "output": "2"}]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (tmp_path / "recipe.toml").write_text(f'name = "tiny"\nbase = "{tiny_base}"\n', "utf-8")
    checkpoint = open_checkpoint(load_recipe(tmp_path / "recipe.toml").base)
    encoder = Encoder(Tokenizer(tiny_base), [2])
    kept = fitting_split(read_split(file, "held out"), encoder, checkpoint)
    assert kept.numbers == [1] and len(kept.conversations) == 1
    assert "1 of 2 records do not fit" in caplog.text and "record 2" in caplog.text
    file.write_text(json.dumps(rows[1]) + "\n", "utf-8")
    with pytest.raises(StillhouseError, match="record 1"):
        fitting_split(read_split(file, "held out"), encoder, checkpoint)


@pytest.mark.parametrize(("prompt", "answer"), [(1, 1), (1, 4), (2, 1), (9, 1), (9, 5)])
def test_the_answers_logits_are_those_of_the_whole(tiny_base: Path, prompt: int, answer: int) -> None:
    runner = TorchRunner(load(tiny_base))
    tokens = np.random.default_rng(prompt).integers(3, 1000, prompt + answer).tolist()
    found = _answer_logits(runner, Example(tokens[:prompt], tokens[prompt:]))
    assert found.shape[0] == answer
    assert found == pytest.approx(runner.prefill(0, tokens[:-1], 0)[prompt - 1 :], abs=1e-4)


def test_a_full_disk_says_what_there_is_then() -> None:
    options: Any = TuneOptions.model_construct()
    with (
        pytest.raises(StillhouseError, match="the disk is full") as refused,
        sentences(options, "nothing was there"),
    ):
        raise SafetensorError("I/O error: No space left on device")
    assert refused.value.hint is not None and refused.value.hint.endswith("nothing was there")
