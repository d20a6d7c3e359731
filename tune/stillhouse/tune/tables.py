"""TOML recipes read into pydantic models; what is wrong in one becomes a line that names the key."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from stillhouse.engine.errors import UsageError, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

Model = TypeVar("Model", bound=BaseModel)


def read_tables(path: Path, model: type[Model]) -> Model:
    """The TOML file at `path` as a `model`. Raises UsageError: no such file, no TOML, or a key that is wrong."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}", hint="name a TOML file; docs/tune.md shows one") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a recipe", hint="name the TOML file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", hint="a recipe is a TOML file in UTF-8") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}", hint='strings need quotes: name = "support"') from None
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        raise _named(path, model, error) from None


def _named(path: Path, model: type[BaseModel], error: ValidationError) -> UsageError:
    first = error.errors()[0]
    where = [part for part in first["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in where)
    known = f"known here: {', '.join(_known_keys(model, where[:-1]))}"
    if first["type"] == "extra_forbidden":
        return UsageError(f"{path}: unknown key '{key}'", hint=known)
    if first["type"] == "missing":
        return UsageError(f"{path}: '{key}' is missing", hint=known)
    if first["type"] == "literal_error":
        expected = str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        return UsageError(f"{path}: {key}: unknown value {shown(first['input'])}", hint=f"known: {expected}")
    message = first["msg"].removeprefix("Value error, ")
    return UsageError(f"{path}: {key or 'recipe'}: {message}", hint=known)


def _known_keys(model: type[BaseModel], where: list[Any]) -> list[str]:
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
