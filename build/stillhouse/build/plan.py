"""The plan: what a recipe asks for, checked and hashed before a weight is loaded; what is there already."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from stillhouse.build import publish as publishing
from stillhouse.build.adapter import Adapter, open_adapter
from stillhouse.build.budget import refuse_unknown
from stillhouse.build.cache import cache_root, entry_name, is_cached, key_of
from stillhouse.build.checkpoint import Checkpoint, open_checkpoint
from stillhouse.build.quantize import METHODS, Method, calibrates, has_budget, method_of, stage_options
from stillhouse.build.recipe import QuantizeOptions, Recipe
from stillhouse.build.reckon import Sizes, disk, memory
from stillhouse.build.tasks import Tasks, read_tasks
from stillhouse.build.texts import Text, evaluation_text, runs_of, token_ids, token_windows
from stillhouse.build.tokenizer_files import misread_before
from stillhouse.engine.directory import VersionDirectory, sha256_of
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.manifest import GateRecord, Precision, Target

# Raised when the same inputs would give other bytes or other figures than before.
FORMAT = 5
MERGE_FORMAT = 2  # of what a merge records beside the weights
SEVERAL_FORMAT = 2  # of merges of several adapters, or of one with a weight
TOKENIZER_FORMAT = 2  # of tokenizers that older builds misread
CALIBRATION_FORMAT = 1
PRICED_FORMAT = 2  # of what a byte budget buys
UNPACK_FORMAT = 2
CUDA_FORMAT = 2
MAKERS = ("torch", "transformers", "peft", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "numpy")


@dataclass(frozen=True, slots=True)
class PlannedVersion:
    """One precision of a plan: how it is made, the hash of its inputs, and the version that has them already."""

    precision: Precision
    model: str
    method: Method
    options: dict[str, Any]
    stage_key: str
    calibration_key: str | None
    inputs_sha256: str
    gate: GateRecord
    existing: VersionDirectory | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a build of `recipe` would do, known before a weight is loaded."""

    recipe: Recipe
    repository: Path
    base: Checkpoint
    adapters: list[Adapter]
    text: Text
    tasks: Tasks | None
    tools: dict[str, str]
    merge_key: str
    reference_key: str
    versions: list[PlannedVersion]

    def entry_names(self) -> list[str]:
        """The entries of the stage cache that the build makes or takes."""
        return [entry_name(name, key) for name, key in _stages(self.versions, self.merge_key, self.reference_key)]


def plan(recipe: Recipe, repository: Path, *, force: bool = False) -> Plan:
    """Reads and checks all inputs of `recipe`, hashes them, and looks for versions that have them already.

    Raises StillhouseError for every unsound input that can be told without loading weights.
    """
    publishing.check_repository(repository)
    methods = {
        precision: method_of(precision, recipe.options(precision), recipe.target) for precision in recipe.precisions
    }
    tasks = read_tasks(recipe.evaluate.tasks) if recipe.evaluate.tasks is not None else None
    base = open_checkpoint(recipe.base, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    if base.quantized and recipe.adapters:
        raise StillhouseError(
            f"base: {base.id} is quantized already; an adapter cannot be merged into 4-bit integers",
            hint="name the unquantized base; the build quantizes the merge",
        )
    adapters = [open_adapter(ref, base) for ref in recipe.adapters]
    text = evaluation_text(recipe.evaluate.text)
    if recipe.evaluate.text is not None and (base.path / "tokenizer.json").is_file():
        token_windows(token_ids(text, base.path / "tokenizer.json"), base.context_length)  # refused now, not later
    tools = {name: metadata.version(name) for name in ("stillhouse", *MAKERS)}
    makers = {name: tools[name] for name in MAKERS}
    weights = {
        "format": FORMAT,
        "base": base.sha256,
        "adapters": [[adapter.sha256, adapter.weight] for adapter in adapters],
        "makers": makers,
    }
    if base.quantized:
        weights["unpacked"] = UNPACK_FORMAT
    if len(adapters) > 1 or any(adapter.weight != 1.0 for adapter in adapters):
        weights["several"] = SEVERAL_FORMAT
    if misread_before(base.path, [adapter.path for adapter in adapters]):
        weights["tokenizer"] = TOKENIZER_FORMAT
    weights_key = key_of(weights)
    # The merge also says what it changed on the text; the weights, and all that is made of them, do not depend on it.
    merge_key = key_of({"format": MERGE_FORMAT, "weights": weights_key, "text": text.sha256})
    versions: list[PlannedVersion] = []
    for precision, method in methods.items():
        asked = recipe.options(precision)
        options = stage_options(method, asked)
        _refuse_misfits(precision, method, asked, base, text)
        calibration_key = None
        if calibrates(method, asked) and not (base.quantized and method.name == "auto"):
            file = sha256_of(Path(asked.calibration)) if asked.calibration else None
            calibration_key = key_of({"weights": weights_key, "file": file, "format": CALIBRATION_FORMAT})
        priced = calibration_key is not None and (method.name == "auto" or has_budget(asked))
        stage_key = _stage_key(weights_key, recipe.target, method, options, calibration_key, priced=priced)
        gate = recipe.gate_of(precision)
        inputs = {
            "format": FORMAT,
            "name": recipe.name,
            "made": stage_key,
            "text": text.sha256,
            "tasks": tasks.sha256 if tasks else None,
            "gate": gate.model_dump(),
        }
        model = recipe.model_name(precision)
        existing = None if force else publishing.find_same(repository / model, key_of(inputs))
        versions.append(
            PlannedVersion(
                precision, model, method, options, stage_key, calibration_key, key_of(inputs), gate, existing
            )
        )
    reference_key = _stage_key(weights_key, "cpu", METHODS["fp32"][0], {}, None)
    return Plan(recipe, repository, base, adapters, text, tasks, tools, merge_key, reference_key, versions)


def _refuse_misfits(precision: Precision, method: Method, asked: QuantizeOptions, base: Checkpoint, text: Text) -> None:
    """Raises for options of the quantize stage that do not fit the base or the texts: before hours, not after."""
    if not method.bits:
        return
    width = int(base.config["hidden_size"])
    if width % asked.block_size:
        able = ", ".join(str(size) for size in (16, 32, 64, 128, 256) if width % size == 0)
        raise UsageError(
            f"quantize.{precision}.block_size: an embedding of width {width} has no whole blocks of {asked.block_size}",
            hint=f"block sizes that fit: {able}" if able else "take precisions that leave floats",
        )
    refuse_unknown(asked.keep_int8, base.tensors)
    if asked.calibration is None:
        return
    from stillhouse.build.calibrate import LENGTH, windows_of  # which loads ONNX Runtime

    same = evaluation_text(asked.calibration).sha256 == text.sha256
    if not same and (tokenizer := base.path / "tokenizer.json").is_file():
        calibrated = windows_of(asked.calibration, tokenizer, min(LENGTH, base.context_length))
        held_out = token_windows(token_ids(text, tokenizer), base.context_length)
        same = not runs_of(calibrated).isdisjoint(runs_of(held_out))
    if same:
        raise UsageError(
            f"quantize.{precision}.calibration: {asked.calibration} has text that the gate is held on",
            hint="name another text, or none: the model's own samples are good",
        )


def dry_run(plan_: Plan) -> dict[str, Any]:
    """What `build` would do with this plan: stages, memory and disk in bytes (reckoned)."""
    root, target = cache_root(), plan_.recipe.target
    wanted = [version for version in plan_.versions if version.existing is None]
    keys = _stages(wanted, plan_.merge_key, plan_.reference_key) if wanted else []
    todo = [name for name, key in keys if not is_cached(root, name, key)]
    sizes, methods = Sizes.of(plan_.base), [version.method for version in wanted]
    return {
        "versions": [
            {
                "model": version.model,
                "method": version.method.name,
                "existing": version.existing.manifest.version if version.existing else None,
            }
            for version in plan_.versions
        ],
        "stages": todo,
        "memory_bytes": memory(sizes, todo, methods) if wanted else 0,
        "disk_bytes": disk(sizes, todo, methods, target) if wanted else 0,
        "disk_free_bytes": min(shutil.disk_usage(_existing(folder)).free for folder in (root, plan_.repository)),
        "cache": str(root),
    }


def _stages(versions: list[PlannedVersion], merge_key: str, reference_key: str) -> list[tuple[str, str]]:
    """The cached stages of `versions`: each one's name and key."""
    keys = [("merge", merge_key), ("fp32", reference_key)]
    keys += [("calibrate", v.calibration_key) for v in versions if v.calibration_key is not None]
    return keys + [(v.precision, v.stage_key) for v in versions if v.precision != "fp32"]


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    return next(place for place in (folder.resolve(), *folder.resolve().parents) if place.is_dir())


def _stage_key(
    weights_key: str,
    target: Target,
    method: Method,
    options: dict[str, Any],
    calibration_key: str | None,
    *,
    priced: bool = False,
) -> str:
    inputs = {
        "weights": weights_key,
        "target": target if target == "cpu" else [target, CUDA_FORMAT],
        "stage": method.stage,
        "method": method.name,
        "options": options,
        "calibration": calibration_key,
    }
    return key_of(inputs | ({"priced": PRICED_FORMAT} if priced else {}))
