"""Which built versions are measured: those that are live, or those that one build made."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from stillhouse.build.adapter import Adapter, open_adapter
from stillhouse.build.checkpoint import Checkpoint
from stillhouse.build.recipe import Recipe
from stillhouse.engine.directory import VersionDirectory, open_version
from stillhouse.engine.errors import UsageError
from stillhouse.engine.policy import live_versions
from stillhouse.tune.measure import provider_of, version_subject
from stillhouse.tune.measure_cache import Model

log = logging.getLogger(__name__)


def live_of(recipe: Recipe, repository: Path) -> list[Path]:
    """The live version of each of the recipe's precisions that the repository has; what it lacks is said."""
    found = []
    for precision in recipe.precisions:
        model = repository / recipe.model_name(precision)
        live = live_versions(model) if model.is_dir() else []
        if live:
            found.append(model / str(live[-1]))
        else:
            log.info("%s has no %s: it is not measured", repository, model.name)
    return found


def built_in(folder: Path) -> list[Path]:
    """The versions that `stillhouse build --output FOLDER` made or found. Raises UsageError for no such folder."""
    file = folder / "build.json"
    try:
        results = json.loads(file.read_text("utf-8"))["results"]
        return [Path(result["path"]) for result in results if result["path"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} says of no build: {error}", hint="'stillhouse build --output' writes it") from None


def versions_of(recipe: Recipe, checkpoint: Checkpoint, versions: Sequence[Path]) -> Iterator[Model]:
    """The versions as models to measure; one that was built from other adapters than the recipe names is warned of."""
    adapters = [open_adapter(ref, checkpoint) for ref in recipe.adapters]
    for path in versions:
        version = open_version(path)
        _note_other_adapters(version, adapters)
        yield _version(version, f"{version.manifest.model} v{version.manifest.version}")


def _version(version: VersionDirectory, name: str) -> Model:
    provider = provider_of(version)
    files = {file.path: file.sha256 for file in version.manifest.files}
    made_of = {"files": files, "network": version.manifest.network.model_dump(), "provider": provider}
    return Model(name, made_of, lambda: version_subject(version, name, provider))


def _note_other_adapters(version: VersionDirectory, adapters: list[Adapter]) -> None:
    """Warns where a version was built from other adapters: then it is held against what it was not made from."""
    built = [(record.sha256, record.weight) for record in version.manifest.adapters]
    if built != [(adapter.sha256, adapter.weight) for adapter in adapters]:
        log.warning("warning: %s was built from other adapters than the recipe names; build it again", version.path)
