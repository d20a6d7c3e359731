"""Publish: a whole, immutable version in the repository, or none.

A version is written into a temporary sibling `.new-…` of its model's directory, fsynced, re-hashed, opened by the
engine, and only then renamed to its number. `rename` refuses a target that is there, so nothing is overwritten. A
build holds a flock on its own `.new-…` directory; one that nobody holds belongs to a build that died, and is removed.
The short part that takes a number, renames and moves the policy holds a flock on the model's directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stillhouse.build.locks import clear_unheld, held_temporary
from stillhouse.engine.directory import MANIFEST, MODEL, VersionDirectory, locked, open_version, version_numbers
from stillhouse.engine.durable import sync_directory, write_atomically, write_text
from stillhouse.engine.errors import StillhouseError, VersionError
from stillhouse.engine.manifest import FileRecord, Manifest
from stillhouse.engine.options import ENGINE_JSON
from stillhouse.engine.policy import CONFIG, live_versions, set_live_versions

log = logging.getLogger(__name__)

TEMPORARY = ".new-"
REMOVED = ".removed-"
FILES = (
    MODEL, "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "generation_config.json", "genai_config.json",
)  # fmt: skip
_OPTIONAL = {"chat_template.jinja"}  # a base that was never taught to chat has none
_CONFIG_TEXT = 'backend: "stillhouse"\n'
_ENGINE_TEXT = "{}\n"


@dataclass(frozen=True, slots=True)
class Published:
    """Where a version lies, whether this call made it, and which versions are live afterwards."""

    path: Path
    new: bool
    live: list[int]


def find_same(model_directory: Path, inputs_sha256: str) -> VersionDirectory | None:
    """The newest whole version that was built from the same inputs; one that was tampered with does not count."""
    for number in reversed(version_numbers(model_directory)):
        version = _whole_with(model_directory / str(number), inputs_sha256)
        if version is not None:
            return version
    return None


def check_repository(repository: Path) -> None:
    """Raises StillhouseError where nothing could be published into `repository`, before hours are spent on it.

    Nothing is made: where there is no such folder yet, what counts is the nearest one above it.
    """
    try:
        there = next(place for place in (repository, *repository.absolute().parents) if place.exists())
        writable = there.is_dir()
        if writable:
            with tempfile.TemporaryFile(dir=there):  # it has no name
                pass
    except OSError as error:
        raise StillhouseError(
            f"cannot write into the repository {repository}: {error.strerror}", hint="name another with --repository"
        ) from None
    if not writable:
        raise StillhouseError(f"{there} is a file, not a model repository", hint="name a folder")
    if (repository / CONFIG).is_file():
        raise StillhouseError(
            f"{repository} is one model's directory, not a repository",
            hint=f"name the folder above it: --repository {repository.parent}",
        )


def publish(
    sources: dict[str, Path],
    manifest: Callable[[int, list[FileRecord]], Manifest],
    model_directory: Path,
    *,
    probe: Callable[[Path], None],
    force: bool = False,
    make_live: bool = True,
) -> Published:
    """Publishes the files `sources` (name in the version → where it is now) as the next version.

    `manifest(version, files)` gives its manifest; `probe` opens the finished directory and raises where it does not
    answer. Where a version of the same inputs is there by now, and without `force`, nothing is published.
    Raises StillhouseError where the disk is full or the repository cannot be written.
    """
    with _sentences(model_directory):
        model_directory.mkdir(parents=True, exist_ok=True)
        clear_leftovers(model_directory)
        with held_temporary(model_directory, TEMPORARY) as temporary:
            files = [_copy(sources[name], temporary / name) for name in FILES if name in sources]
            draft = manifest(max(version_numbers(model_directory), default=0) + 1, files)
            write_text(temporary / MANIFEST, draft.to_json())
            sync_directory(temporary)
            open_version(temporary, verify=True)
            probe(temporary)
            with locked(model_directory):
                same = None if force else find_same(model_directory, draft.inputs_sha256)
                if same is not None:
                    return Published(same.path, False, live_versions(model_directory))
                version = max(version_numbers(model_directory), default=0) + 1
                if version != draft.version:  # another build was quicker
                    write_text(temporary / MANIFEST, manifest(version, files).to_json())
                _write_settings(model_directory)
                before = live_versions(model_directory)
                final = model_directory / str(version)
                temporary.rename(final)
                sync_directory(model_directory)
                sync_directory(model_directory.parent)
                live = _move_policy(model_directory, version, before) if make_live or not before else before
                return Published(final, True, live)


def go_live(version: Path) -> list[int]:
    """Makes the version that is there already the live one, by itself; returns what is live."""
    with locked(version.parent):
        before, number = live_versions(version.parent), int(version.name)
        if before[-1:] != [number]:
            set_live_versions(version.parent, [number], previous=before[-1] if before else None)
        return live_versions(version.parent)


def missing_sources(sources: dict[str, Path]) -> list[str]:
    """The files that a version needs and `sources` lacks."""
    return [name for name in FILES if name not in sources and name not in _OPTIONAL]


def clear_leftovers(model_directory: Path) -> None:
    """Removes what builds and removals that died left beside the versions."""
    for prefix in (TEMPORARY, REMOVED):
        clear_unheld(model_directory, prefix)


def _whole_with(directory: Path, inputs_sha256: str) -> VersionDirectory | None:
    try:
        version = open_version(directory, verify=False)
        if version.manifest.inputs_sha256 != inputs_sha256:
            return None
        return open_version(directory, verify=True)
    except VersionError as error:
        log.warning("not taken for a version that is there already: %s", error)
        return None


def _move_policy(model_directory: Path, version: int, before: list[int]) -> list[int]:
    """The new version takes the place of the one that was live; where several were live, it joins them."""
    live = sorted({*before, version}) if len(before) > 1 else [version]
    set_live_versions(model_directory, live, previous=before[-1] if before else None)
    return live


def _write_settings(model_directory: Path) -> None:
    """config.pbtxt and engine.json where they are absent; without a policy, so that a crash leaves no wrong one."""
    if not (model_directory / CONFIG).is_file():
        write_atomically(model_directory / CONFIG, _CONFIG_TEXT)
    if not (model_directory / ENGINE_JSON).is_file():
        write_atomically(model_directory / ENGINE_JSON, _ENGINE_TEXT)


@contextlib.contextmanager
def _sentences(model_directory: Path) -> Iterator[None]:
    """A full disk or a read-only file system becomes a line; an empty model directory does not stay behind."""
    try:
        yield
    except OSError as error:
        hint = "name another repository with --repository"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some disk space; nothing was published, what was finished before is whole"
        raise StillhouseError(f"cannot publish into {model_directory}: {error.strerror}", hint=hint) from error
    finally:
        with contextlib.suppress(OSError):
            model_directory.rmdir()


def _copy(source: Path, destination: Path) -> FileRecord:
    """Copies and fsyncs one file; its size and sha256 are those of the bytes that were read."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, destination.open("wb") as writer:
        while piece := reader.read(1 << 20):
            digest.update(piece)
            size += len(piece)
            writer.write(piece)
        writer.flush()
        os.fsync(writer.fileno())
    return FileRecord(path=destination.name, bytes=size, sha256=digest.hexdigest())
