"""The pipeline's stages compile to what Kubeflow takes: the same command lines, cached by all that they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run as command
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.stages import Stage, pipeline_options, stages_of

Write = Callable[..., Path]
CLUSTER = '[pipeline]\nimage = "registry/stillhouse:1"\nvolume = "support"\n'


def stages(recipe: Path) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages_of(recipe, recipe.parent / "repository")}


@pytest.fixture
def compiled(write: Write) -> tuple[Path, dict[str, Any]]:
    """The recipe, and the Kubeflow definition of it, as kfp itself reads it back."""
    from kfp.components import load_component_from_file

    more = "[prune]\nheads = 0.5\n" + CLUSTER + "prune = true\npromote = 'grpc://triton:8001'\n"
    recipe = write(more=more)
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


def test_what_a_stage_reads_is_a_parameter_of_it_so_that_kubeflows_cache_asks_again(write: Write) -> None:
    from google.protobuf.json_format import MessageToDict
    from kfp.components import load_component_from_file

    values, row = [], '{"instruction": "What is six?", "output": "The number 6."}\n'
    for rows, repository in ((3, "here"), (4, "there")):  # where this machine has its models is nothing to a cluster
        recipe = write(more=CLUSTER)
        (recipe.parent / "heldout.jsonl").write_text(row * rows, "utf-8")
        file = recipe.parent / "pipeline.yaml"
        assert command(["pipeline", str(recipe), "--compile", str(file), "--repository", repository]) == 0
        tasks = MessageToDict(load_component_from_file(str(file)).pipeline_spec)["root"]["dag"]["tasks"]
        values.append({name: task["inputs"]["parameters"]["inputs"]["runtimeValue"] for name, task in tasks.items()})
    assert {name for name in values[0] if values[0][name] != values[1][name]} == {"data", "evaluate", "precisions"}


@pytest.mark.parametrize(
    ("more", "moving"),
    [("promote = 'grpc://triton:8001'\n", {"promote-tiny-fp16", "promote-tiny-int8"}), ("", {"build"})],
)
def test_kubeflows_cache_never_stands_for_what_moves_the_live_version(
    more: str, moving: set[str], write: Write
) -> None:
    """Back from recipe B to A every hash is known to it; A must go live all the same."""
    import yaml

    recipe = write(more=CLUSTER + more)
    file = recipe.parent / "pipeline.yaml"
    assert command(["pipeline", str(recipe), "--compile", str(file)]) == 0
    spec = next(yaml.safe_load_all(file.read_text("utf-8")))
    cached = {
        name for name, task in spec["root"]["dag"]["tasks"].items() if task["cachingOptions"].get("enableCache", False)
    }
    assert cached == set(stages(recipe)) - moving


def test_what_cannot_be_compiled_is_one_line(write: Write, tmp_path: Path) -> None:
    from stillhouse.tune.kubeflow import compile_pipeline

    recipe = write()
    table = list(stages(recipe).values())
    with pytest.raises(UsageError, match="the recipe names none"):
        compile_pipeline("tiny", table, recipe, pipeline_options(recipe), tmp_path / "out.yaml")
    recipe = write(more='[pipeline]\nimage = "i"\n')
    with pytest.raises(UsageError, match="from a volume"):
        compile_pipeline("tiny", table, recipe, pipeline_options(recipe), tmp_path / "out.yaml")
    recipe = write(more=CLUSTER)
    with pytest.raises(UsageError, match=r"is no \.yaml file"):
        compile_pipeline("tiny", table, recipe, pipeline_options(recipe), tmp_path / "out.json")


def test_without_kfp_it_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from stillhouse.tune.kubeflow import compile_pipeline

    monkeypatch.setitem(sys.modules, "kfp", None)
    recipe = write(more=CLUSTER)
    with pytest.raises(StillhouseError, match="needs kfp") as missing:
        compile_pipeline("tiny", list(stages(recipe).values()), recipe, pipeline_options(recipe), tmp_path / "a.yaml")
    assert missing.value.hint == "pip install 'stillhouse[pipeline]'"
