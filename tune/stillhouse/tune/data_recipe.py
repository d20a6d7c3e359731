"""The recipe of `stillhouse data prepare`: which records, what is checked, removed and made up, how it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from stillhouse.build.recipe import HUB_ID, Name, resolve_source
from stillhouse.build.tables import read_tables, validated
from stillhouse.engine.errors import UsageError, shown

Share = float
FORMATS = ("jsonl", "json", "csv", "parquet", "dataset")
FIELDS = ("instruction", "input", "output", "messages", "label", "group")
_SHARED = ("name", "base", "revision")
MEASURED_ON = ("records", "tasks", "general", "general_tasks")  # keys of [evaluate] whose files have prompts
PERSONAL = ("email", "phone", "card", "id")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Table):
    """[[sources]]: files (a path or a glob), a dataset's folder, or a hub id, and which column is which field.

    `columns` maps fields to columns; what it leaves out is looked for under its usual names. `keep` are columns that
    are carried along as they are. `split` chooses one of a dataset's splits.
    """

    path: str
    format: Literal["jsonl", "json", "csv", "parquet", "dataset"] | None = None
    encoding: str = "utf-8"
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    columns: dict[Literal["instruction", "input", "output", "messages", "label", "group"], str] = {}
    keep: list[str] = []
    split: str | None = None
    revision: str | None = None

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, name: str) -> str:
        try:
            "".encode(name)
        except LookupError:
            raise ValueError(f"Python knows no encoding {name!r}; utf-8, cp1252 and utf-16 are some") from None
        return name


class Checks(_Table):
    """[checks]: a larger share of bad records than this ends the run: the mapping is wrong, then, not the records."""

    max_rejected_share: Share = Field(default=0.2, ge=0, le=1)


class Filters(_Table):
    """[filters]: lengths in characters; languages in ISO 639-1, judged on texts of at least `language_min_chars`."""

    encoding: bool = True
    min_output_chars: int = Field(default=1, ge=1)
    max_output_chars: int | None = Field(default=None, ge=1)
    max_prompt_chars: int | None = Field(default=None, ge=1)
    languages: list[str] = []
    language_min_chars: int = Field(default=100, ge=1)


class Duplicates(_Table):
    """[duplicates]: Jaccard similarities of character shingles; `near` 1 or more turns near-duplicates off.

    Records at least `group` alike, and prompts at least `near` alike, are never split apart.
    """

    exact: bool = True
    near: float = Field(default=0.8, gt=0)
    group: float = Field(default=0.6, gt=0, le=1)
    shingle: int = Field(default=5, ge=2, le=20)
    permutations: int = Field(default=128, ge=32, le=512)


class Contamination(_Table):
    """[contamination]: evaluation files whose prompts must not be in the data; alike by `threshold`, or contained.

    A file is a path, or a table like one of [[sources]]. Those of the recipe's [evaluate] are always among them.
    """

    against: list[Source] = []
    threshold: Share = Field(default=0.8, gt=0, le=1)

    @field_validator("against", mode="before")
    @classmethod
    def _plain_strings(cls, against: Any) -> Any:
        if not isinstance(against, list):
            return against
        return [{"path": entry} if isinstance(entry, str) else entry for entry in against]


class Perplexity(_Table):
    """[perplexity]: answers under a scoring model (the recipe's base), kept between two percentiles."""

    model: str | None = None
    low: float = Field(default=1.0, ge=0, lt=100)
    high: float = Field(default=99.0, gt=0, le=100)
    max_tokens: int = Field(default=512, ge=16)
    batch_tokens: int = Field(default=2048, ge=64)
    device: str | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Perplexity:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high}): they are percentiles")
        return self


class PersonalData(_Table):
    """[personal_data]: what is found and masked, e.g. [EMAIL]."""

    mask: list[Literal["email", "phone", "card", "id"]] = []


class Balance(_Table):
    """[balance]: of the training records' labels. `oversample` repeats records of small classes up to `target_share` of
    the largest class, so that each is there `cap` times at most; `weights` writes a weight into every record."""

    method: Literal["none", "oversample", "weights"] = "none"
    cap: int = Field(default=3, ge=1)
    target_share: Share = Field(default=1.0, gt=0, le=1)


class Split(_Table):
    """[split]: shares of the records, by groups of what is alike and, where there are labels, within each label."""

    train: Share = Field(default=0.8, gt=0, le=1)
    validation: Share = Field(default=0.1, ge=0, lt=1)
    test: Share = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _whole(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, validation and test must sum to 1, not {total:g}")
        return self


class Coverage(_Table):
    """[coverage]: how many topics are looked for (by default from the number of records), and below what is thin."""

    topics: int | None = Field(default=None, ge=1)
    thin: int = Field(default=10, ge=1)
    sample: int = Field(default=20_000, ge=100)


class Synthetic(_Table):
    """[synthetic]: records made up by a model behind an OpenAI-compatible API.

    `prompts` are Jinja templates; they see `examples` (records drawn from the data), `label` and `number`. `count`
    records are asked for, `per_label` of each label where it is given. Prices are for a million tokens.

    `json_schema`: the server is told to hold answers to the schema. `corrections`: how often an answer outside of it is
    asked for again; `attempts`: how often a request is sent that the server could not serve.
    """

    url: str
    model: str
    prompts: list[str] = Field(min_length=1)
    count: int = Field(default=0, ge=0)
    per_label: int = Field(default=0, ge=0)
    labels: list[str] = []
    examples: int = Field(default=3, ge=0)
    system: str | None = None
    temperature: float = Field(default=0.8, ge=0, le=2)
    max_tokens: int = Field(default=512, ge=1)
    json_schema: bool = True
    parallel: int = Field(default=4, ge=1, le=64)
    corrections: int = Field(default=2, ge=0, le=20)
    attempts: int = Field(default=5, ge=1)
    timeout_s: float = Field(default=120, gt=0)
    api_key_env: str = "OPENAI_API_KEY"
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _asks_for_something(self) -> Synthetic:
        if (self.count == 0) == (self.per_label == 0):
            raise ValueError("give count or per_label, one of the two")
        return self


class DataRecipe(_Table):
    """A whole recipe; paths are absolute once `load_data_recipe` has read it."""

    name: Name
    base: str | None = None
    revision: str | None = None
    seed: int = 0
    format: Literal["jsonl", "parquet"] = "jsonl"
    sources: list[Source] = Field(min_length=1)
    checks: Checks = Checks()
    personal_data: PersonalData = PersonalData()
    filters: Filters = Filters()
    duplicates: Duplicates = Duplicates()
    contamination: Contamination = Contamination()
    perplexity: Perplexity | None = None
    synthetic: Synthetic | None = None
    split: Split = Split()
    balance: Balance = Balance()
    coverage: Coverage = Coverage()

    _folder: str = PrivateAttr(default=".")

    @property
    def folder(self) -> str:
        """Where the recipe lies; what the card names is seen from there."""
        return self._folder

    @property
    def scoring_model(self) -> str | None:
        """The model that the perplexity filter scores with: a folder or a hub id."""
        return self.perplexity.model or self.base if self.perplexity else None


def load_data_recipe(path: Path) -> DataRecipe:
    """The recipe at `path`, its relative paths made absolute. Raises UsageError that names the key that is wrong.

    A recipe.toml of the other rooms holds it as a table [data], whose name and base are those above it, or names its
    file: data = "data.toml".
    """
    tables, outer = read_tables(path), path.resolve().parent
    evaluate = tables.get("evaluate", {})
    within: tuple[str, ...] = ()
    if isinstance(named := tables.get("data"), str):
        path = path.resolve().parent / Path(named).expanduser()
        tables = read_tables(path)
    elif isinstance(named, dict):
        tables, within = {key: tables[key] for key in _SHARED if key in tables} | named, ("data",)
    elif named is not None:
        hint = 'data = "data.toml", or a table [data]'
        raise UsageError(f"{path}: data: a recipe's file or a recipe, got {shown(named)}", hint=hint)
    recipe = validated(path, DataRecipe, tables, within=within)
    folder = path.resolve().parent
    update: dict[str, Any] = {
        "sources": [_resolved(source, folder) for source in recipe.sources],
        "contamination": recipe.contamination.model_copy(update={"against": _against(recipe, folder, evaluate, outer)}),
    }
    if recipe.base:
        update["base"] = resolve_source(recipe.base, folder)
    if recipe.perplexity:
        if not (recipe.perplexity.model or recipe.base):
            raise UsageError(
                f"{path}: perplexity: no model to score with", hint='say base = "…", or [perplexity] model = "…"'
            )
        if recipe.perplexity.model:
            model = resolve_source(recipe.perplexity.model, folder)
            update["perplexity"] = recipe.perplexity.model_copy(update={"model": model})
    resolved = recipe.model_copy(update=update)
    resolved._folder = str(folder)
    return resolved


def _resolved(source: Source, folder: Path) -> Source:
    """The source with its path made absolute; a hub id stays one where no such folder is there."""
    local = (folder / Path(source.path).expanduser()).resolve()
    is_hub = source.format in (None, "dataset") and HUB_ID.fullmatch(source.path) and not Path(source.path).suffix
    return source.model_copy(update={"path": source.path if is_hub and not local.exists() else str(local)})


def _against(recipe: DataRecipe, folder: Path, evaluate: Any, outer: Path) -> list[Source]:
    """The evaluation files that [contamination] names, and those of [evaluate] in the recipe of all rooms."""
    named = [_resolved(source, folder) for source in recipe.contamination.against]
    files = [evaluate[key] for key in MEASURED_ON if isinstance(evaluate, dict) and isinstance(evaluate.get(key), str)]
    own = [_resolved(Source(path=file), outer) for file in files]
    known = {source.path for source in named}
    return named + [source for source in own if source.path not in known]
