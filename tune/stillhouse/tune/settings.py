"""[tune] of a recipe: what a fine-tune is asked for, refused by name before a weight is loaded.

One recipe.toml may serve every room: name, base and revision are the build's; tables of other rooms are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from stillhouse.build.recipe import resolve_source
from stillhouse.build.tables import read_tables, validated
from stillhouse.engine.errors import UsageError

ALL_LINEAR = "all-linear"
# What an earlier adapter fixes, so that a run that goes on from it cannot choose.
_OF_THE_ADAPTER = ("r", "alpha", "dropout", "targets", "rslora", "dora")
PLACES = {"data", "train", "validation", "test", "output", "start_from"}  # settings that are paths
_SPLITS = ("train", "validation", "test")

_STRICT = ConfigDict(extra="forbid", frozen=True)


class TuneOptions(BaseModel):
    """[tune]: LoRA supervised fine-tuning. The defaults are the practice's.

    `data` is a dataset's folder (train, validation and test as .jsonl or .parquet); `train`, `validation` and `test`
    name files in its place. `batch_size` counts sequences a step on one device: examples, or packed sequences of up
    to `max_length` tokens each. Lengths are in tokens, `warmup` is a share of all steps.
    """

    model_config = _STRICT

    data: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    output: str = "adapter"
    start_from: str | None = None

    r: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0, allow_inf_nan=False)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = Field(default=["q_proj", "v_proj"], min_length=1)
    rslora: bool = False
    dora: bool = False
    qlora: bool = False

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulation: int = Field(default=1, ge=1)
    max_length: int = Field(default=1024, ge=8)
    packing: bool = False
    learning_rate: float = Field(default=2e-5, gt=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)

    patience: int = Field(default=2, ge=0)
    evaluate_every_steps: int | None = Field(default=None, ge=1)
    save_every_steps: int | None = Field(default=None, ge=1)
    divergence_window: int = Field(default=20, ge=2)
    divergence_rise: float = Field(default=0.5, gt=0, allow_inf_nan=False)

    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False

    @field_validator("targets")
    @classmethod
    def _targets_once(cls, targets: list[str] | str) -> list[str] | str:
        if isinstance(targets, list):
            if ALL_LINEAR in targets:
                raise ValueError(f'"{ALL_LINEAR}" stands alone: targets = "{ALL_LINEAR}"')
            if len(set(targets)) != len(targets) or not all(targets):
                raise ValueError("name each module once")
        return targets

    @model_validator(mode="after")
    def _makes_sense(self) -> TuneOptions:
        given = self.model_fields_set
        files = [split for split in _SPLITS if getattr(self, split) is not None]
        if self.data is not None and files:
            raise ValueError(f"data names a whole dataset, {files[0]} one file of it: give one or the other")
        if self.data is None and self.train is None:
            raise ValueError("no data: give data (a dataset's folder), or train and validation (files)")
        if self.data is None and self.validation is None and self.patience:
            raise ValueError("early stopping needs validation data: name validation, or say patience = 0")
        if self.data is None and self.validation is None and self.evaluate_every_steps is not None:
            raise ValueError("evaluate_every_steps without validation data")
        if self.start_from is not None and (fixed := [word for word in _OF_THE_ADAPTER if word in given]):
            raise ValueError(f"start_from goes on with an adapter whose {fixed[0]} is fixed: leave {fixed[0]} out")
        if self.device == "cpu" and self.qlora:
            raise ValueError("qlora needs a GPU (4-bit kernels), and device is cpu")
        if self.device == "cpu" and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 needs a GPU, and device is cpu: say bf16 or no")
        return self


class TuneRecipe(BaseModel):
    """What `stillhouse tune` reads of a recipe; paths are absolute, or hub ids, once `load_tune_recipe` has read it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = "adapter"
    base: str
    revision: str | None = None
    tune: TuneOptions


def load_tune_recipe(path: Path, changes: Sequence[str] = ()) -> TuneRecipe:
    """The recipe at `path` with `changes` made (build/tables.py), its relative paths made absolute by its folder.

    Raises UsageError that names the key, or the file that is not there.
    """
    return _resolved(validated(path, TuneRecipe, read_tables(path, changes)), path.resolve().parent)


def _resolved(recipe: TuneRecipe, folder: Path) -> TuneRecipe:
    options = recipe.tune
    paths: dict[str, Any] = {"output": str((folder / Path(options.output).expanduser()).resolve())}
    for key in ("data", *_SPLITS):
        if (named := getattr(options, key)) is not None:
            paths[key] = _existing(f"tune.{key}", folder, named, folder_wanted=key == "data")
    if options.start_from is not None:
        paths["start_from"] = resolve_source(options.start_from, folder)
    base = resolve_source(recipe.base, folder)
    return recipe.model_copy(update={"base": base, "tune": options.model_copy(update=paths)})


def _existing(key: str, folder: Path, named: str, *, folder_wanted: bool) -> str:
    path = (folder / Path(named).expanduser()).resolve()
    if not (path.is_dir() if folder_wanted else path.is_file()):
        kind = "folder" if folder_wanted else "file"
        raise UsageError(f"{key}: no such {kind}: {path}", hint="paths in a recipe are relative to the recipe")
    return str(path)
