"""TOML recipes of every room, read into pydantic models; what is wrong in one becomes a line that names the key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from stillhouse.engine.errors import UsageError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Model = TypeVar("Model", bound=BaseModel)
Tables = dict[str, Any]


def read_tables(path: Path, changes: Sequence[str] = ()) -> Tables:
    """The TOML file at `path`, with `changes` ("tune.epochs=1") made. Raises UsageError: no such file, or no TOML."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        hint = "name a recipe.toml; examples/support/recipe.toml is one, docs/tune.md shows others"
        raise UsageError(f"no recipe at {path}", hint=hint) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a recipe", hint=f"name the file, e.g. {path}/recipe.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", hint="a recipe is a TOML file in UTF-8") from None
    try:
        tables: Tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", hint='strings need quotes: name = "support"') from None
    for change in changes:
        _change(tables, change, path)
    return tables


def validated(
    path: Path,
    model: type[Model],
    tables: Any,
    *,
    within: Sequence[str] = (),
    nouns: Mapping[str, str] | None = None,
) -> Model:
    """`tables` as a `model`; `within` is where they lie in the recipe at `path`.

    `nouns` says what the values of a key are, where a wrong one is called more than an unknown value. Raises
    UsageError that names the key as it is written in the recipe, and what is known there.
    """
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise _refused(path, model, error, list(within), nouns or {}) from None


def _refused(
    path: Path, model: type[BaseModel], error: ValidationError, within: list[str], nouns: Mapping[str, str]
) -> UsageError:
    first = error.errors()[0]
    # "[key]" is a key itself; of a choice of types, pydantic names the one that it tried: targets.list[str].
    where = [part for part in first["loc"] if "[" not in str(part)]
    key = ".".join(str(part) for part in [*within, *where])
    known = f"known here: {', '.join(_known_keys(model, where[:-1]))}"
    if first["type"] == "extra_forbidden":
        return UsageError(f"{path}: unknown key '{key}'", hint=known)
    if first["type"] == "missing":
        return UsageError(f"{path}: '{key}' is missing", hint=known)
    if first["type"] == "literal_error":
        expected = str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        noun = nouns.get(str(where[0]), "value")
        return UsageError(f"{path}: {key}: unknown {noun} {shown(first['input'])}", hint=f"known: {expected}")
    message = first["msg"].removeprefix("Value error, ")
    message += "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
    return UsageError(f"{path}: {key or 'recipe'}: {message}", hint=known)


def _known_keys(model: type[BaseModel], where: Sequence[Any]) -> list[str]:
    """The keys of the table at `where` in a recipe of `model`."""
    for part in where:
        field = model.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        model = inner or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _change(tables: Tables, change: str, path: Path) -> None:
    """Sets one key, as of `--set tune.epochs=1`; a value that is no TOML is taken for text."""
    key, equals, value = change.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    if not equals or not last or not all(parents):
        raise UsageError(f"cannot set {change!r}", hint="name a key and its value: --set tune.epochs=1")
    table: Any = tables
    for part in parents:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(
                f"{path}: cannot set {key}: {part} is no table of the recipe",
                hint=f"write [{part}], and its keys below it",
            )
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value
