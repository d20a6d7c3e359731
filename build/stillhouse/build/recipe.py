"""recipe.toml: what a build is asked for (DESIGN §9)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from stillhouse.build.tables import read_tables, validated
from stillhouse.engine.errors import UsageError, shown
from stillhouse.engine.manifest import GateRecord, Precision, Target

NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*")
_LONGEST_NAME = 200  # of the 255 that a file's name may have: a time, a precision or a process is added
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
OTHER_ROOMS = ("data", "tune", "prune", "pipeline")  # tables that other commands read of the same file
_NOUNS = {"precisions": "precision", "quantize": "precision", "gate": "precision", "target": "target"}
Figure = Literal[
    "records_perplexity", "exact_match_accuracy", "multiple_choice_accuracy", "tasks_accuracy", "general_perplexity",
    "general_tasks_accuracy", "text_perplexity",
]  # fmt: skip
PRECISIONS: tuple[str, ...] = get_args(Precision)

# Above these ratios of perplexity, or below TASK_ACCURACY of the original's, a version is not worth its bytes.
TASK_ACCURACY = 0.9
EVALUATION_FILES = ("text", "tasks", "records", "general", "general_tasks")
DEFAULT_GATES: dict[str, GateRecord] = {
    "fp32": GateRecord(perplexity_ratio=1.0001),
    "fp16": GateRecord(perplexity_ratio=1.005),
    "int8": GateRecord(perplexity_ratio=1.01),
    "int4": GateRecord(perplexity_ratio=1.06),
}


def _fit_for_a_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"must be letters, digits, '_' and '-' (models and folders are called by it), got {shown(name)}"
        )
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"has {len(name)} letters; models and folders are called by it: {_LONGEST_NAME} at most")
    return name


Name = Annotated[str, AfterValidator(_fit_for_a_name)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterRef(_Table):
    """One adapter: a folder or a hub id, and the factor that its change is multiplied by."""

    path: str
    revision: str | None = None
    weight: float = Field(default=1.0, allow_inf_nan=False)


class QuantizeOptions(_Table):
    """[quantize.<precision>]: `method` is a row of `quantize.METHODS`, or "auto" for the best that fits the bytes.

    `keep_int8` names what int4 keeps at 8 bits: "lm_head", a kind ("down_proj") or one weight
    ("layers.3.mlp.down_proj"). `calibration` is a text file; without one the model's own samples are taken.
    `max_bytes`, or `max_bytes_share` of the FP16 version's bytes, bounds the version's directory.
    """

    method: str = "auto"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool | None = None
    keep_int8: list[str] = Field(default_factory=list)
    calibration: str | None = None
    max_bytes: int | None = Field(default=None, gt=0)
    max_bytes_share: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)


class EvaluateOptions(_Table):
    """[evaluate]: the held-out text that fidelity is measured on; None is the text that every Python carries.

    `tasks` is a JSONL file of questions with known answers (tasks.py), whose accuracy is measured and gated too.
    The rest is for `stillhouse evaluate` alone: `records` with answers that nobody trained on, and for forgetting
    `general` records and `general_tasks`, which have nothing to do with the fine-tune. `better` and `not_worse` name
    figures in which the fine-tune must beat the base, or must not be beaten by it, by more than chance.
    """

    text: str | None = None
    tasks: str | None = None
    records: str | None = None
    general: str | None = None
    general_tasks: str | None = None
    better: list[Figure] = Field(default_factory=list)
    not_worse: list[Figure] = Field(default_factory=list)


class Gate(_Table):
    """[gate.<precision>]: what a version must hold to be published."""

    perplexity_ratio: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    top1_agreement: float | None = Field(default=None, ge=0, le=1)
    task_accuracy: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class Recipe(_Table):
    """A whole recipe; `base`, adapters and text are absolute paths or hub ids once `load_recipe` has read it."""

    name: Name
    base: str
    revision: str | None = None
    trust_remote_code: bool = False
    adapters: list[AdapterRef] = Field(default_factory=list)
    precisions: list[Precision] = Field(default=["fp16", "int8", "int4"], min_length=1)
    target: Target = "cpu"
    quantize: dict[Precision, QuantizeOptions] = Field(default_factory=dict)
    evaluate: EvaluateOptions = EvaluateOptions()
    gate: dict[Precision, Gate] = Field(default_factory=dict)

    @field_validator("adapters", mode="before")
    @classmethod
    def _plain_strings(cls, adapters: Any) -> Any:
        if not isinstance(adapters, list):
            return adapters
        return [{"path": entry} if isinstance(entry, str) else entry for entry in adapters]

    @field_validator("precisions")
    @classmethod
    def _each_once(cls, precisions: list[Precision]) -> list[Precision]:
        if twice := _named_twice(precisions):
            raise ValueError(f"{twice!r} is named twice")
        return precisions

    def model_name(self, precision: str) -> str:
        """The Triton model's name of one precision, e.g. "support-int4"."""
        return f"{self.name}-{precision}"

    def options(self, precision: Precision) -> QuantizeOptions:
        return self.quantize.get(precision, QuantizeOptions())

    def gate_of(self, precision: Precision) -> GateRecord:
        """The precision's default gate with what the recipe says on top; tasks are gated where there are any."""
        asked = self.gate.get(precision, Gate()).model_dump(exclude_none=True)
        tasks = {"task_accuracy": TASK_ACCURACY} if self.evaluate.tasks is not None else {}
        return DEFAULT_GATES[precision].model_copy(update=tasks | asked)


def load_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe at `path`, with `changes` made (tables.py) and its relative paths made absolute against its folder.

    Raises UsageError that names the key and the known ones, or the file that is not there.
    """
    tables = read_tables(path, changes)
    own = {key: table for key, table in tables.items() if key not in OTHER_ROOMS}
    recipe = validated(path, Recipe, own, nouns=_NOUNS)
    if recipe.evaluate.tasks is None and any(gate.task_accuracy is not None for gate in recipe.gate.values()):
        raise UsageError(
            f"{path}: gate: task_accuracy, but there are no tasks", hint='name some: [evaluate] tasks = "….jsonl"'
        )
    return _resolved(recipe, path.resolve().parent)


def resolve_source(source: str, folder: Path) -> str:
    """A checkpoint's folder made absolute, or `source` itself where it is no folder but looks like a hub id."""
    local = (folder / Path(source).expanduser()).resolve()
    try:
        there = local.exists()
    except OSError as error:  # a name that is too long, say
        raise UsageError(
            f"cannot look for {shown(source)}: {error.strerror}", hint="name a folder, or a hub id like owner/name"
        ) from None
    return str(local) if there or not HUB_ID.fullmatch(source) else source


def _resolved(recipe: Recipe, folder: Path) -> Recipe:
    adapters = [
        adapter.model_copy(update={"path": resolve_source(adapter.path, folder)}) for adapter in recipe.adapters
    ]
    if twice := _named_twice([adapter.path for adapter in adapters]):
        raise UsageError(
            f"adapters: {twice} is named twice", hint="name each once; { path = …, weight = 2.0 } doubles its change"
        )
    evaluate = recipe.evaluate
    quantize = {
        precision: options.model_copy(
            update={"calibration": _resolved_file(f"quantize.{precision}.calibration", options.calibration, folder)}
        )
        if options.calibration is not None  # a word that is not said stays unsaid
        else options
        for precision, options in recipe.quantize.items()
    }
    return recipe.model_copy(
        update={
            "quantize": quantize,
            "base": resolve_source(recipe.base, folder),
            "adapters": adapters,
            "evaluate": evaluate.model_copy(
                update={
                    key: _resolved_file(f"evaluate.{key}", getattr(evaluate, key), folder) for key in EVALUATION_FILES
                }
            ),
        }
    )


def _resolved_file(key: str, name: str | None, folder: Path) -> str | None:
    if name is None:
        return None
    file = (folder / Path(name).expanduser()).resolve()
    hint = "paths in a recipe are relative to the recipe"
    try:
        there = file.is_file()
    except OSError as error:
        raise UsageError(f"{key}: cannot look for {shown(name)}: {error.strerror}", hint=hint) from None
    if not there:
        raise UsageError(f"{key}: no such file: {file}", hint=hint)
    return str(file)


def _named_twice(names: Sequence[str]) -> str | None:
    """The first name that is there a second time."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)
