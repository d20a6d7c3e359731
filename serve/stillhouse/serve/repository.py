"""What of a model repository is to be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.engine.directory import model_directories, open_version
from stillhouse.engine.errors import UsageError, VersionError
from stillhouse.engine.options import EngineOptions, read_options
from stillhouse.engine.policy import CONFIG, live_versions
from stillhouse.serve.others import other_models


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model of the repository and the versions of it that are live."""

    name: str
    versions: tuple[int, ...]

    def __str__(self) -> str:
        return ", ".join(f"{self.name}/{version}" for version in self.versions)


def served_models(repository: Path, names: Sequence[str] | None = None) -> list[ServedModel]:
    """Our models called `names`, or all of ours, each with its live versions, whose manifests have been read.

    Raises VersionError where `repository` holds no versions or a live one is not sound, UsageError for a name that
    is not there or where none is ours. The files themselves are hashed by the engine when it loads them.
    """
    directories = {directory.name: directory for directory in model_directories(repository)}
    if not directories:
        raise VersionError(
            f"{repository} is not a model repository: it holds no <name>-<precision>/<version>/",
            hint="name one with --repository, or make one with 'stillhouse build RECIPE.toml'",
        )
    for name in names or ():
        if name not in directories:
            raise UsageError(f"{repository} has no model {name!r}", hint=f"it has: {', '.join(directories)}")
    others = other_models(repository)
    ours = [name for name in dict.fromkeys(names or directories) if name not in others]
    if not ours:
        raise UsageError(
            f"{', '.join(names or others)} of {repository}: of other backends, none is a version of ours",
            hint="tritonserver serves them without 'stillhouse serve'; make one with 'stillhouse build RECIPE.toml'",
        )
    return [_served(directories[name]) for name in ours]


def _served(directory: Path) -> ServedModel:
    if not (directory / CONFIG).is_file():
        raise VersionError(
            f"{directory} has no {CONFIG}, so Triton cannot load it",
            hint="'stillhouse build' writes it; its one needed line is: backend: \"stillhouse\"",
        )
    versions = live_versions(directory)
    for version in versions:
        open_version(directory / str(version), verify=False)
    return ServedModel(directory.name, tuple(versions))


def checked_engine_options(
    repository: Path, models: Sequence[ServedModel], engine: Mapping[str, int | None]
) -> dict[str, int]:
    """The options that were given, after a check of each against what it would make of the models' engine.json.

    Raises UsageError for one that is unknown or out of range.
    """
    given = {key: value for key, value in engine.items() if value is not None}
    if unknown := sorted(given.keys() - EngineOptions.model_fields.keys()):
        raise UsageError(
            f"unknown engine option {unknown[0]!r}", hint=f"known: {', '.join(EngineOptions.model_fields)}"
        )
    for model in models:
        read_options(repository / model.name, dict(given))
    return given
