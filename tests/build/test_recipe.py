"""recipe.toml: what is asked for is read whole, or refused in one line that names the key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stillhouse.build.quantize import method_of
from stillhouse.build.recipe import EvaluateOptions, Gate, QuantizeOptions, Recipe, load_recipe
from stillhouse.build.starter import write_recipe
from stillhouse.engine.errors import UsageError


def recipe_of(folder: Path, text: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(text, "utf-8")
    return file


def test_relative_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "text.txt").write_text("words")
    recipe = load_recipe(
        recipe_of(
            tmp_path,
            'name = "a"\nbase = "base"\nadapters = ["one", { path = "two", weight = 0.5 }]\n'
            '[evaluate]\ntext = "text.txt"\n[gate.int4]\nperplexity_ratio = 1.1\n',
        )
    )
    assert recipe.base == str(tmp_path / "base")
    assert [(adapter.path, adapter.weight) for adapter in recipe.adapters] == [
        (str(tmp_path / "one"), 1.0),
        (str(tmp_path / "two"), 0.5),
    ]
    assert recipe.evaluate.text == str(tmp_path / "text.txt")
    assert recipe.precisions == ["fp16", "int8", "int4"]
    assert recipe.gate_of("int4").perplexity_ratio == 1.1
    assert recipe.gate_of("int8").perplexity_ratio == 1.01


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    assert load_recipe(recipe_of(tmp_path, 'name = "a"\nbase = "owner/model"\n')).base == "owner/model"


@pytest.mark.parametrize(
    ("text", "named", "hinted"),
    [
        ('name = "a"\nbase = "b"\nprecison = []\n', "unknown key 'precison'", "precisions"),
        ('name = "a"\nbase = "b"\nprecisions = ["int2"]\n', "unknown precision 'int2'", "int4"),
        ('name = "a"\nbase = "b"\n[quantize.int2]\n', "unknown precision 'int2'", "int4"),
        ('name = "a"\nbase = "b"\n[quantize.int4]\nbits = 4\n', "unknown key 'quantize.int4.bits'", "method"),
        ('name = "a"\nbase = "b"\n[quantize.int4]\nblock_size = 48\n', "quantize.int4.block_size", "32"),
        ('name = "a"\nbase = "b"\n[gate.int4]\ntop1_agreement = 87\n', "gate.int4.top1_agreement", "perplexity_ratio"),
        ('name = "a"\nbase = "b"\ntarget = "tpu"\n', "unknown target 'tpu'", "cuda"),
        ('name = "a"\nbase = "b"\nprecisions = []\n', "precisions", "name"),
        ('name = "a/b"\nbase = "b"\n', "must be letters", "name"),
        (f'name = "{"n" * 300}"\nbase = "b"\n', "name: has 300 letters", "base"),
        (f'name = "a"\nbase = "{"b" * 300}"\n', "cannot look for 'bbb", "hub id"),
        (f'name = "a"\nbase = "b"\n[evaluate]\ntext = "{"t" * 300}"\n', "evaluate.text: cannot look for", "relative"),
        ('name = "a"\nbase = "b"\nprecisions = ["int8", "int8"]\n', "'int8' is named twice", "precisions"),
        ('name = "a"\nbase = "b"\nadapters = ["x", "y", "x"]\n', "x is named twice", "weight"),
        ('name = "a"\nbase = "b"\n[evaluate]\ntext = "none.txt"\n', "evaluate.text: no such file", "relative"),
        ('name = "a"\nbase = "b"\n[evaluate]\ntasks = "none"\n', "evaluate.tasks: no such file", "relative"),
        ('name = "a"\nbase = "b"\n[gate.int8]\ntask_accuracy = 0.9\n', "there are no tasks", "evaluate"),
        ('base = "b"\n', "'name' is missing", "base"),
        ('name = "a"\nbase = b\n', "is not TOML", "quotes"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_key(
    tmp_path: Path, text: str, named: str, hinted: str
) -> None:
    with pytest.raises(UsageError) as refused:
        load_recipe(recipe_of(tmp_path, text))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.hint is not None
    assert hinted in refused.value.hint


def test_a_key_can_be_changed_for_once(tmp_path: Path) -> None:
    file = recipe_of(tmp_path, 'name = "a"\nbase = "owner/model"\n[gate.int4]\nperplexity_ratio = 1.1\n')
    changes = ["gate.int4.perplexity_ratio=1.2", "quantize.int8.block_size=64", 'adapters=["/x"]', "base=owner/other"]
    recipe = load_recipe(file, changes)
    assert (recipe.gate["int4"].perplexity_ratio, recipe.options("int8").block_size) == (1.2, 64)
    assert ([adapter.path for adapter in recipe.adapters], recipe.base) == (["/x"], "owner/other")
    for change, words in (("base", "cannot set 'base'"), ("name.of.it=1", "name is no table"), ("nam=1", "key 'nam'")):
        with pytest.raises(UsageError, match=words):
            load_recipe(file, [change])


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no recipe at .*nowhere\.toml"):
        load_recipe(tmp_path / "nowhere.toml")


def test_an_unknown_method_and_a_target_that_cannot_be_built_are_refused_with_what_can() -> None:
    with pytest.raises(UsageError, match="unknown method 'magic'") as refused:
        method_of("int4", QuantizeOptions(method="magic"), "cpu")
    assert refused.value.hint == "known: auto, gptq, k_quant, hqq, rtn"
    with pytest.raises(UsageError, match="fp32 cannot be built for cuda"):
        method_of("fp32", QuantizeOptions(), "cuda")
    assert method_of("fp16", QuantizeOptions(), "cuda").name == "converter"


def test_tasks_bring_a_default_gate(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text("{}")
    text = 'name = "a"\nbase = "b"\n[evaluate]\ntasks = "tasks.jsonl"\n[gate.int4]\ntask_accuracy = 0.5\n'
    recipe = load_recipe(recipe_of(tmp_path, text))
    assert recipe.evaluate.tasks == str(tmp_path / "tasks.jsonl")
    assert (recipe.gate_of("int8").task_accuracy, recipe.gate_of("int4").task_accuracy) == (0.9, 0.5)
    assert load_recipe(recipe_of(tmp_path, 'name = "a"\nbase = "b"\n')).gate_of("int8").task_accuracy is None


def test_the_starter_is_a_recipe_and_names_every_key(tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "new", "mine")
    recipe = load_recipe(file)
    assert (recipe.name, recipe.adapters, recipe.precisions) == ("mine", [], ["fp16", "int8", "int4"])
    text = file.read_text("utf-8")
    # What is commented out must be right too.
    uncommented = re.sub(r"^# (\w+ = |\[)", r"\1", text, flags=re.MULTILINE).replace("adapters = []\n", "")
    (tmp_path / "new" / "prose.txt").write_text("other words")
    (tmp_path / "new" / "held-out.txt").write_text("words")
    for name in ("tasks", "held-out", "general"):
        (tmp_path / "new" / f"{name}.jsonl").write_text("{}")
    whole = load_recipe(recipe_of(tmp_path / "new", uncommented))
    assert [(Path(adapter.path).name, adapter.weight) for adapter in whole.adapters] == [
        ("my-adapter", 1.0),
        ("another", 0.5),
    ]
    for model, read in ((Recipe, whole), (EvaluateOptions, whole.evaluate), (Gate, whole.gate["int4"])):
        assert set(model.model_fields) == read.model_fields_set
    with pytest.raises(UsageError, match="is there already"):
        write_recipe(tmp_path / "new", "mine")
    with pytest.raises(UsageError, match="no model's name"):
        write_recipe(tmp_path / "other", "a/b")
