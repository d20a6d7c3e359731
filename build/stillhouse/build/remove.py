"""Remove: a version goes in one rename, or stays; the live one stays in any case."""

from __future__ import annotations

from pathlib import Path

from stillhouse.build.locks import held_temporary
from stillhouse.build.publish import REMOVED, clear_leftovers
from stillhouse.engine.directory import locked, model_directories, version_numbers
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.policy import live_versions


def remove(repository: Path, model: str, version: int) -> int:
    """Removes a version of `model` from `repository`; returns the bytes that it had.

    It is renamed to a name with a dot first, so that nobody ever finds half of it. Raises UsageError where there is no
    such version, StillhouseError where it is live or the repository cannot be written.
    """
    directory = repository / model
    known = [path.name for path in model_directories(repository)]
    if model not in known:
        raise UsageError(f"{repository} has no model {model!r}", hint=f"models there: {', '.join(known) or 'none'}")
    try:
        clear_leftovers(directory)
        with locked(directory):
            there, live = version_numbers(directory), live_versions(directory)
            if version not in there:
                raise UsageError(
                    f"{model} has no version {version}", hint=f"versions there: {', '.join(map(str, there))}"
                )
            if version in live:
                raise StillhouseError(
                    f"{model} version {version} is live",
                    hint=f"make another one live first: stillhouse promote {model} VERSION",
                )
            with held_temporary(directory, REMOVED) as grave:
                gone = (directory / str(version)).rename(grave / str(version))
                return sum(file.stat().st_size for file in gone.rglob("*") if file.is_file())
    except OSError as error:
        raise StillhouseError(
            f"cannot remove {directory / str(version)}: {error.strerror}", hint="who owns the repository?"
        ) from error
