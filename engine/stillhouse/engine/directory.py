"""The version directory: the one contract between build, cloud and edge (DESIGN §3)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from stillhouse.engine.errors import NotThereError, StillhouseError, TamperedError, VersionError
from stillhouse.engine.manifest import Manifest

MANIFEST = "manifest.json"
MODEL = "model.onnx"


@dataclass(frozen=True, slots=True)
class VersionDirectory:
    """A version on disk: its path and what its manifest says."""

    path: Path
    manifest: Manifest

    @property
    def model_path(self) -> Path:
        return self.path / MODEL


def open_version(path: Path, *, verify: bool = True) -> VersionDirectory:
    """Reads the manifest of the version at `path`; with `verify`, re-hashes every file.

    Raises NotThereError when there is nothing at `path`, VersionError when there is no sound manifest, TamperedError
    when a file differs from it.
    """
    manifest_path = path / MANIFEST
    if not path.exists():
        raise NotThereError(f"no such version: {path}", hint="'stillhouse versions' lists what is there")
    if not manifest_path.is_file():
        raise VersionError(f"{path} is not a version directory: it has no {MANIFEST}", hint=_where_versions_are(path))
    try:
        manifest = Manifest.model_validate_json(manifest_path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise VersionError(
            f"{manifest_path} does not follow schema 1: {where}: {first['msg']}",
            hint="build the version again with 'stillhouse build'",
        ) from error
    version = VersionDirectory(path, manifest)
    if verify:
        verify_files(version)
    return version


def verify_files(version: VersionDirectory) -> None:
    """Raises TamperedError, naming the first file that is missing or differs in size or sha256."""
    hint = "build the version again, or fetch it again from where it came"
    for record in version.manifest.files:
        file = version.path / record.path
        if not file.is_file():
            raise TamperedError(f"{file} is missing, but the manifest lists it", hint=hint)
        size = file.stat().st_size
        if size != record.bytes:
            raise TamperedError(f"{file} has {size} bytes, its manifest says {record.bytes}", hint=hint)
        found = sha256_of(file)
        if found != record.sha256:
            raise TamperedError(
                f"{file} differs from its manifest: sha256 {found[:12]}…, expected {record.sha256[:12]}…",
                hint=hint,
            )


def sha256_of(file: Path) -> str:
    """The file's sha256 in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def version_numbers(model_directory: Path) -> list[int]:
    """The version numbers below a model's directory, in ascending order; a name with a dot or a letter is none."""
    if not model_directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in model_directory.iterdir() if entry.is_dir() and entry.name.isdecimal())


def model_directories(repository: Path) -> list[Path]:
    """The directories of a Triton repository that hold at least one version, by name."""
    if not repository.is_dir():
        raise NotThereError(
            f"{repository} is not a model repository: no such directory",
            hint="name one with --repository, or make one with 'stillhouse build RECIPE.toml'",
        )
    return sorted(
        entry
        for entry in repository.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and version_numbers(entry)
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the flock of a directory (a model's: publishing, removing, promoting); waits for whoever holds it.

    It must not be one that the caller holds itself.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(place: Path, busy: StillhouseError) -> Iterator[None]:
    """Holds the flock of a file or directory that is there; raises `busy` where another process does.

    Whoever died holds nothing.
    """
    descriptor = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield
    finally:
        os.close(descriptor)


def _where_versions_are(path: Path) -> str:
    versions = version_numbers(path)
    if versions:
        return f"name a version below it, e.g. {path / str(versions[-1])}"
    return "a version directory is model_repository/<name>-<precision>/<version>"
