"""The pipeline's table of stages: each is a command line of `stillhouse`, what it reads, and what it leaves behind.

    data → tune → evaluate → prune → build → precisions → promote

The same table is run on this machine (pipeline.py) and compiled for a cluster (kubeflow.py). Command lines name places:
{recipe}, {repository}, {out} for the stage's own folder, and by its name the folder of any stage before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from stillhouse.build.adapter import open_adapter
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.plan import FORMAT, MAKERS
from stillhouse.build.recipe import EVALUATION_FILES, AdapterRef, Recipe, load_recipe
from stillhouse.build.tables import Tables, read_tables, validated
from stillhouse.build.texts import evaluation_text
from stillhouse.client.address import parse_url
from stillhouse.client.errors import ClientError
from stillhouse.engine.directory import MANIFEST, open_version, sha256_of
from stillhouse.engine.errors import UsageError
from stillhouse.tune import revisions
from stillhouse.tune.data_inputs import inputs_of
from stillhouse.tune.data_recipe import DataRecipe, load_data_recipe
from stillhouse.tune.evaluation_picture import PICTURE
from stillhouse.tune.evaluation_recipe import load_evaluation, refuse_unmeasured
from stillhouse.tune.prune_options import REPORT, prune_options
from stillhouse.tune.settings import PLACES, TuneOptions, TuneRecipe, load_tune_recipe
from stillhouse.tune.splits import find_split

DATA, TUNE, EVALUATE, PRUNE = "data", "tune", "evaluate", "prune"
BUILD, PRECISIONS, PROMOTE = "build", "precisions", "promote"
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step: the `arguments` of `stillhouse`, and all that decides its result.

    `reads` are its settings, and the hashes of the files that it reads; `after` are the stages whose results it reads.
    `result` names the files in its folder that those after it depend on.
    """

    name: str
    arguments: tuple[str, ...]
    reads: dict[str, Any]
    after: tuple[str, ...] = ()
    result: Callable[[Path], list[Path]] = field(default=lambda _: [])
    pictures: tuple[str, ...] = ()  # patterns of files in its folder
    moves: bool = False  # it moves what is live: begun for other inputs since, it is no longer done

    def command(self, places: Mapping[str, Any]) -> list[str]:
        """Its arguments with `places` in them, by name."""
        return [re.sub(r"{(\w+)}", lambda named: str(places.get(named[1], named[0])), each) for each in self.arguments]

    @property
    def kind(self) -> str:
        """Which stage of the pipeline it is; there is one to promote for every model."""
        return PROMOTE if self.name.startswith(PROMOTE) else self.name


class PipelineOptions(BaseModel):
    """[pipeline]: which stages there are beside those that the recipe's other tables ask for, and where.

    `promote` is the gRPC address of the server on which each version that was built goes live. `image` and `volume` are
    for a cluster: a container image with stillhouse, and the claim that holds the recipe and the model repository.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prune: bool = False
    promote: str | None = None
    image: str | None = None
    volume: str | None = None


def pipeline_options(path: Path) -> PipelineOptions:
    """The table [pipeline] of the recipe at `path`. Raises UsageError that names the key that is wrong."""
    options = validated(path, PipelineOptions, read_tables(path).get("pipeline", {}), within=("pipeline",))
    if options.promote is not None:
        try:
            is_grpc = parse_url(options.promote).is_grpc
        except ClientError as error:
            raise UsageError(f"{path}: pipeline.promote: {error}", hint=error.hint) from None
        if not is_grpc:
            raise UsageError(
                f"{path}: pipeline.promote: models are loaded over gRPC, got {options.promote}",
                hint='give its gRPC port: promote = "grpc://HOST:8001"',
            )
    return options


def stages_of(path: Path, repository: Path | None) -> list[Stage]:
    """The stages that the recipe at `path` asks for, in their order; versions go into `repository`.

    None: into one that is not known here, a cluster's.
    Every table is read, and every file of the recipe hashed. Raises UsageError that names the key, or the file that is
    not there; StillhouseError for inputs that are not sound.
    """
    tables, options = read_tables(path), pipeline_options(path)
    _refuse_what_does_not_fit(path, tables)
    data = load_data_recipe(path) if "data" in tables else None
    # The dataset is not there yet; any folder that is stands for it while the recipe is read.
    tuning = load_tune_recipe(path, [f"tune.data={path.resolve().parent}"] if data else [])
    adapter = f"adapters=[{json.dumps(tuning.tune.output)}]"
    asked = load_recipe(path, [adapter]) if data else load_evaluation(path, [adapter])
    refuse_unmeasured(asked, records_follow=data is not None)
    base = {"base": open_checkpoint(asked.base, asked.revision, trust_remote_code=asked.trust_remote_code).sha256}
    learnt = base | _tune_settings(tuning, made=data is not None) | revisions.code_of(revisions.TUNE)
    # The stages of which the dataset and the fine-tune come, and how those after them are told of it.
    made: tuple[str, ...] = (DATA,) if data else ()
    dataset: tuple[str, ...] = ("--set", f"tune.data={{data}}/{data.name}/1") if data else ()
    tuned = ("--set", 'adapters=["{tune}/adapter"]')
    stages = [_data_stage(data)] if data else []
    stages.append(_tune_stage(learnt, made, dataset))
    stages.append(_evaluate_stage(base | _evaluation(asked), (*made, TUNE), (*dataset, *tuned)))
    if options.prune:
        cut = prune_options(tables.get("prune", {}), path).model_dump(exclude={"output"})
        said = learnt | _evaluation(asked) | {f"prune.{key}": value for key, value in cut.items()}
        said |= revisions.code_of(revisions.PRUNE)
        stages.append(_prune_stage(said, (*made, TUNE), (*dataset, *tuned)))
    pruned = ("--set", "base={prune}/pruned", "--set", "adapters=[]")
    source, whole = (PRUNE, pruned) if options.prune else (TUNE, tuned)
    live = "--keep-live" if options.promote else "--live"
    said = base | ({"repository": str(repository.resolve())} if repository is not None else {}) | _build_settings(asked)
    stages.append(_build_stage(said, (source,), (*whole, live)))
    # The gate was held before: what was pruned is a base by itself, of which it would make no sense.
    ungated = ("--set", "evaluate.better=[]", "--set", "evaluate.not_worse=[]")
    said = base | _evaluation_files(asked) | revisions.code_of(revisions.MEASURED)
    stages.append(_precisions_stage(said, (BUILD, *made, source), (*dataset, *whole, *ungated)))
    if options.promote:
        stages += [_promote_stage(asked.model_name(precision), options.promote) for precision in asked.precisions]
    return stages


def _refuse_what_does_not_fit(path: Path, tables: Tables) -> None:
    if "tune" not in tables:
        raise UsageError(f"{path}: 'tune' is missing", hint="a pipeline trains: [tune] says how (docs/tune.md)")
    tune = tables["tune"]
    if "data" in tables and isinstance(tune, dict) and (named := [k for k in ("data", *_SPLITS) if k in tune]):
        raise UsageError(
            f"{path}: the recipe makes a dataset (data), and tune.{named[0]} names another",
            hint="leave out the one or the other",
        )
    output = tune.get("output", "adapter") if isinstance(tune, dict) else "adapter"
    if (adapters := tables.get("adapters", [])) not in ([], [output]):
        raise UsageError(
            f"{path}: adapters: the pipeline builds the adapter that it tunes, not {adapters}",
            hint="leave adapters out; [tune] start_from goes on from an earlier one",
        )


def _data_stage(recipe: DataRecipe) -> Stage:
    def splits(out: Path) -> list[Path]:
        files = [out / recipe.name / "1" / f"{split}.{recipe.format}" for split in _SPLITS]
        return [file for file in files if file.is_file() or file.stem == "train"]

    # What was paid for outlives a change of [data]: the journal lies beside the stages.
    arguments = ("data", "prepare", "{recipe}", "--json", "--output", "{out}", "--journal", "{out}/..")
    return Stage(DATA, arguments, inputs_of(recipe), (), splits, (f"{recipe.name}/1/plots/*.svg",))


def _tune_stage(reads: dict[str, Any], after: tuple[str, ...], more: tuple[str, ...]) -> Stage:
    def adapter(out: Path) -> list[Path]:
        return [out / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")]

    arguments = ("tune", "{recipe}", "--json", *more, "--set", "tune.output={out}/adapter")
    return Stage(TUNE, arguments, reads, after, adapter, ("adapter/loss.png",))


def _evaluate_stage(reads: dict[str, Any], after: tuple[str, ...], more: tuple[str, ...]) -> Stage:
    arguments = ("evaluate", "{recipe}", "--json", "--no-versions", "--output", "{out}", *more)
    return Stage(EVALUATE, arguments, reads, after, lambda out: [out / "evaluation.json"], (PICTURE,))


def _prune_stage(reads: dict[str, Any], after: tuple[str, ...], more: tuple[str, ...]) -> Stage:
    def checkpoint(out: Path) -> list[Path]:
        """Its files, but for the report, which has timings in it, and the picture."""
        files = sorted(file for file in (out / "pruned").iterdir() if file.is_file())
        return [file for file in files if file.name not in (REPORT, PICTURE)]

    arguments = ("prune", "{recipe}", "--json", "--force", *more, "--set", "prune.output={out}/pruned")
    return Stage(PRUNE, arguments, reads, after, checkpoint, (f"pruned/{PICTURE}",))


def _build_stage(reads: dict[str, Any], after: tuple[str, ...], more: tuple[str, ...]) -> Stage:
    def manifests(out: Path) -> list[Path]:
        """Those of the versions that it made, or found there: they hold the hashes of all else, which are checked."""
        results = json.loads((out / "build.json").read_text("utf-8"))["results"]
        return [open_version(Path(result["path"]), verify=True).path / MANIFEST for result in results]

    arguments = ("build", "{recipe}", "--json", "--repository", "{repository}", "--output", "{out}", *more)
    return Stage(BUILD, arguments, reads, after, manifests, ("quality.png",), moves="--live" in more)


def _precisions_stage(reads: dict[str, Any], after: tuple[str, ...], more: tuple[str, ...]) -> Stage:
    arguments = ("evaluate", "{recipe}", "--json", "--built", "{build}", "--output", "{out}", *more)
    return Stage(PRECISIONS, arguments, reads, after, lambda out: [out / "evaluation.json"], (PICTURE,))


def _promote_stage(model: str, url: str) -> Stage:
    arguments = ("promote", model, "--repository", "{repository}", "--url", url, "--built", "{build}")
    return Stage(f"{PROMOTE}-{model}", arguments, {"model": model, "url": url}, (BUILD,), moves=True)


def _tune_settings(recipe: TuneRecipe, *, made: bool) -> dict[str, Any]:
    options = recipe.tune
    said = {f"tune.{key}": value for key, value in options.model_dump(exclude=PLACES).items()}
    if options.start_from is not None:
        base = open_checkpoint(recipe.base, recipe.revision)
        said["tune.start_from"] = open_adapter(AdapterRef(path=options.start_from), base).sha256
    return said | ({} if made else _own_splits(options))


def _own_splits(options: TuneOptions) -> dict[str, Any]:
    """The hashes of the splits that the recipe names itself."""
    files = {split: getattr(options, split) for split in _SPLITS}
    if options.data is not None:
        files = {split: find_split(Path(options.data), split) for split in _SPLITS}
    return {f"tune.{split}": sha256_of(Path(file)) for split, file in files.items() if file is not None}


def _evaluation(recipe: Recipe) -> dict[str, Any]:
    gate = {"evaluate.better": recipe.evaluate.better, "evaluate.not_worse": recipe.evaluate.not_worse}
    return _evaluation_files(recipe) | gate | revisions.code_of(revisions.MEASURED)


def _evaluation_files(recipe: Recipe) -> dict[str, Any]:
    """The hashes of the files that [evaluate] names, and of the text that it measures on in any case."""
    named = {key: getattr(recipe.evaluate, key) for key in EVALUATION_FILES}
    found = {f"evaluate.{key}": sha256_of(Path(file)) for key, file in named.items() if file is not None}
    return found | {"evaluate.text": evaluation_text(recipe.evaluate.text).sha256}


def _build_settings(recipe: Recipe) -> dict[str, Any]:
    said = recipe.model_dump(include={"name", "precisions", "target", "quantize", "gate"})
    for precision, options in recipe.quantize.items():
        if options.calibration is not None:
            said["quantize"][precision]["calibration"] = sha256_of(Path(options.calibration))
    files = _evaluation_files(recipe)
    said |= revisions.installed(MAKERS) | {"format": FORMAT}
    return said | {key: files[key] for key in ("evaluate.text", "evaluate.tasks") if key in files}
