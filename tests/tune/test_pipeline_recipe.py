"""One recipe makes the table of stages; what is wrong in it is one line; it compiles to what Kubeflow takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run as command
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.stages import Stage, pipeline_options, stages_of

TUNE = "[tune]\nr = 4\nepochs = 1\n"
DATA = '[data]\n[[data.sources]]\npath = "raw.jsonl"\n'
EVALUATE = '[evaluate]\nrecords = "heldout.jsonl"\nbetter = ["records_perplexity"]\n'
ROW = json.dumps({"instruction": "What is six?", "input": "", "output": "The number 6."}) + "\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, tiny_base: Path) -> Write:
    """Writes a recipe beside its files; `more` are its tables."""
    for name in ("raw", "heldout", "train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(ROW * 3, "utf-8")

    def write_recipe(more: str = DATA + TUNE + EVALUATE, *, top: str = 'precisions = ["fp16", "int8"]\n') -> Path:
        file = tmp_path / "recipe.toml"
        file.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n{top}{more}', "utf-8")
        return file

    return write_recipe


def stages(recipe: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(recipe, recipe.parent / "repository")}


def test_the_tables_of_a_recipe_say_which_stages_there_are(write: Write) -> None:
    assert list(stages(write())) == ["data", "tune", "evaluate", "build"]
    own = TUNE + 'train = "train.jsonl"\nvalidation = "validation.jsonl"\n' + EVALUATE
    assert list(stages(write(own))) == ["tune", "evaluate", "build"]
    more = "[prune]\nheads = 0.5\n[pipeline]\nprune = true\npromote = 'grpc://127.0.0.1:1'\n"
    whole = stages(write(DATA + TUNE + EVALUATE + more))
    assert list(whole) == ["data", "tune", "evaluate", "prune", "build", "promote-tiny-fp16", "promote-tiny-int8"]
    assert whole["build"].after == ("prune",)
    assert {"base={prune}/pruned", "adapters=[]", "--keep-live"} <= set(whole["build"].arguments)


def test_a_recipe_may_name_the_datas_recipe_or_hold_it(write: Write) -> None:
    held = stages(write())["data"]
    (write().parent / "data.toml").write_text('name = "tiny"\n[[sources]]\npath = "raw.jsonl"\n')
    named = stages(write(TUNE + EVALUATE, top='data = "data.toml"\n'))["data"]
    assert named.reads["sources"] == held.reads["sources"]


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ("raw", {"data"}),
        ("heldout", {"evaluate"}),
        ("epochs", {"tune"}),
        ("better", {"evaluate"}),
        ("precisions", {"build"}),
        ("base", {"tune", "evaluate", "build"}),
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
    ]
    assert not (recipe.parent / "runs").exists()


@pytest.fixture
def compiled(write: Write) -> tuple[Path, dict[str, Any]]:
    """The recipe, and the Kubeflow definition of it, as kfp itself reads it back."""
    from kfp.components import load_component_from_file

    more = "[prune]\nheads = 0.5\n[pipeline]\nprune = true\npromote = 'grpc://triton:8001'\n"
    recipe = write(DATA + TUNE + EVALUATE + more + 'image = "registry/stillhouse:1"\nvolume = "support"\n')
    file = recipe.parent / "out" / "pipeline.yaml"
    assert command(["pipeline", str(recipe), "--compile", str(file)]) == 0
    loaded = load_component_from_file(str(file))  # which checks it against kfp's own description
    from google.protobuf.json_format import MessageToDict

    return recipe, MessageToDict(loaded.pipeline_spec) | {"platforms": MessageToDict(loaded.platform_spec)}


def test_kubeflow_runs_the_same_command_lines_in_the_same_order(compiled: tuple[Path, dict[str, Any]]) -> None:
    recipe, spec = compiled
    table = stages(recipe)
    tasks, executors = spec["root"]["dag"]["tasks"], spec["deploymentSpec"]["executors"]
    assert set(tasks) == set(table)
    names = list(table)
    for at, (name, stage) in enumerate(table.items()):
        container = executors[spec["components"][tasks[name]["componentRef"]["name"]]["executorLabel"]]["container"]
        assert (container["image"], container["command"]) == ("registry/stillhouse:1", ["stillhouse"])
        said = {
            "recipe": "{{$.inputs.parameters['recipe']}}",
            "repository": "{{$.inputs.parameters['repository']}}",
            "out": "{{$.outputs.artifacts['out'].path}}",
        } | {other: f"{{{{$.inputs.artifacts['{other}'].path}}}}" for other in stage.after}
        assert container["args"] == [argument.format(**said) for argument in stage.arguments]
        if at:  # so that a gate that fails stops what comes next
            assert names[at - 1] in tasks[name]["dependentTasks"]
        mounts = spec["platforms"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{name}"]["pvcMount"]
        assert mounts[0]["mountPath"] == "/work"
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["recipe"]["defaultValue"] == "/work/recipe.toml"
    assert parameters["repository"]["defaultValue"] == "/work/model_repository"


def test_what_a_stage_reads_is_in_its_definition_so_that_kubeflows_cache_asks_again(write: Write) -> None:
    from kfp.components import load_component_from_file

    image = '[pipeline]\nimage = "registry/stillhouse:1"\n'
    values = []
    for rows in (3, 4):
        recipe = write(DATA + TUNE + EVALUATE + image)
        (recipe.parent / "heldout.jsonl").write_text(ROW * rows, "utf-8")
        file = recipe.parent / "pipeline.yaml"
        assert command(["pipeline", str(recipe), "--compile", str(file)]) == 0
        executors = load_component_from_file(str(file)).pipeline_spec.deployment_spec["executors"]
        values.append({name: executors[name]["container"]["env"][0]["value"] for name in executors})
    assert {name for name in values[0] if values[0][name] != values[1][name]} == {"exec-evaluate"}


def test_what_cannot_be_compiled_is_one_line(write: Write, tmp_path: Path) -> None:
    from stillhouse.tune.kubeflow import compile_pipeline

    recipe = write()
    table = list(stages(recipe).values())
    with pytest.raises(UsageError, match="the recipe names none"):
        compile_pipeline("tiny", table, recipe, pipeline_options(recipe), tmp_path / "out.yaml")
    recipe = write(DATA + TUNE + EVALUATE + '[pipeline]\nimage = "i"\n')
    with pytest.raises(UsageError, match=r"is no \.yaml file"):
        compile_pipeline("tiny", table, recipe, pipeline_options(recipe), tmp_path / "out.json")


def test_without_kfp_it_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from stillhouse.tune.kubeflow import compile_pipeline

    monkeypatch.setitem(sys.modules, "kfp", None)
    recipe = write(DATA + TUNE + EVALUATE + '[pipeline]\nimage = "i"\n')
    with pytest.raises(StillhouseError, match="needs kfp") as missing:
        compile_pipeline("tiny", list(stages(recipe).values()), recipe, pipeline_options(recipe), tmp_path / "a.yaml")
    assert missing.value.hint == "pip install 'stillhouse[pipeline]'"
