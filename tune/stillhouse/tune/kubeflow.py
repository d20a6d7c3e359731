"""The pipeline's stages as a Kubeflow Pipelines definition: each a container that runs the same command line.

Results of stages go from one to the next as artifacts; recipe, what it reads, and the model repository lie on a volume.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.build.cache import key_of
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune.stages import PipelineOptions, Stage

MOUNT = "/work"
INPUTS = "inputs"  # the hash of all that a stage reads: Kubeflow's own cache goes by a task's parameters, not its env


def compile_pipeline(name: str, stages: Sequence[Stage], recipe: Path, options: PipelineOptions, output: Path) -> None:
    """Writes the definition to `output`, a .yaml file; kfp checks it while it compiles.

    Raises UsageError where the recipe names no image or no volume, or `output` is no YAML; StillhouseError without kfp.
    """
    if options.image is None:
        raise UsageError(
            "a cluster runs the stages in a container image, and the recipe names none",
            hint='[pipeline] image = "registry/stillhouse:1": one with stillhouse[tune,cpu] in it (docs/tune.md)',
        )
    if options.volume is None:
        raise UsageError(
            "a cluster reads the recipe from a volume and publishes into it, and the recipe names none",
            hint='[pipeline] volume = "support": a claim, mounted at /work (docs/tune.md)',
        )
    if output.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--compile {output} is no .yaml file", hint="--compile pipeline.yaml")
    compiler, dsl, kubernetes = _kfp()
    components = {stage.name: _component(stage, dsl, options.image) for stage in stages}

    def pipeline(recipe: str, repository: str) -> None:
        tasks: dict[str, Any] = {}
        for stage in stages:
            given = {"recipe": recipe, "repository": repository}
            given = {place: value for place, value in given.items() if _names(stage, place)}
            given |= {other: tasks[other].outputs["out"] for other in stage.after if _names(stage, other)}
            task = components[stage.name](**given, **{INPUTS: key_of(stage.reads)})
            task.set_display_name(stage.name)
            if stage.moves:  # Kubeflow's cache knows nothing of another run that moved it since
                task.set_caching_options(False)
            if tasks:  # a gate stops what comes after it, whether that reads its result or not
                task.after(list(tasks.values())[-1])
            kubernetes.mount_pvc(task, pvc_name=options.volume, mount_path=MOUNT)
            tasks[stage.name] = task

    places = {"recipe": f"{MOUNT}/{recipe.name}", "repository": f"{MOUNT}/model_repository"}
    _sign(pipeline, dict.fromkeys(places, str), places)
    output.parent.mkdir(parents=True, exist_ok=True)
    described = dsl.pipeline(name=_dashed(name), description=f"stillhouse pipeline {recipe.name}")(pipeline)
    compiler.Compiler().compile(described, str(output))


def _kfp() -> tuple[Any, Any, Any]:
    warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
    try:
        from kfp import compiler, dsl, kubernetes
    except ImportError as error:
        hint = "pip install 'stillhouse[pipeline]'"
        raise StillhouseError(f"compiling needs kfp and kfp-kubernetes: {error}", hint=hint) from None
    return compiler, dsl, kubernetes


def _component(stage: Stage, dsl: Any, image: str) -> Any:
    """A component whose inputs are the places that the stage's command line names, and the hash of what it reads."""
    places: dict[str, Any] = {"recipe": str, "repository": str, "out": dsl.Output[dsl.Artifact]}
    places |= dict.fromkeys(stage.after, dsl.Input[dsl.Artifact])
    kinds = {place: kind for place, kind in places.items() if _names(stage, place)} | {INPUTS: str}

    def component(*given: Any) -> Any:
        named = {place: getattr(value, "path", value) for place, value in zip(kinds, given, strict=True)}
        return dsl.ContainerSpec(image=image, command=["stillhouse"], args=stage.command(named))

    component.__name__ = stage.name
    _sign(component, kinds)
    return dsl.container_component(component)


def _names(stage: Stage, place: str) -> bool:
    return any(f"{{{place}}}" in argument for argument in stage.arguments)


def _sign(function: Callable[..., Any], kinds: Mapping[str, Any], defaults: Mapping[str, str] | None = None) -> None:
    """Gives a function the signature that kfp reads: parameters of `kinds`."""
    defaults, empty = defaults or {}, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=defaults.get(name, empty)
        )
        for name, kind in kinds.items()
    ]
    function.__annotations__ = dict(kinds)
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def _dashed(name: str) -> str:
    """A name as Kubeflow takes it: small letters, digits and dashes."""
    return name.lower().replace("_", "-")
