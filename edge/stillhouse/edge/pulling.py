"""`stillhouse edge pull`: a newer version from a static HTTP server, whole and tried, or nothing.

A version is fetched into `.pull-N` beside the others, which a later pull goes on with; asked in a process of its own;
renamed to its number; and made live by one rename of config.pbtxt. Whatever moment the power goes, what was live is
live, or the new one is. A running `edge serve` of the model's directory sees the switch and follows it.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from stillhouse.edge.fetching import fetch_file, fetch_text
from stillhouse.edge.loading import fits_instead_of
from stillhouse.edge.memory import TooLittleMemory, megabytes
from stillhouse.edge.smoke import check_answers
from stillhouse.engine.directory import MANIFEST, held, locked, version_numbers
from stillhouse.engine.durable import sync_directory, write_atomically, write_text
from stillhouse.engine.errors import NotThereError, StillhouseError, UsageError, VersionError
from stillhouse.engine.manifest import Manifest
from stillhouse.engine.options import ENGINE_JSON
from stillhouse.engine.policy import (
    CONFIG,
    live_versions,
    named_versions,
    previous_version,
    set_live_versions,
)

_STAGED, _LOCK = ".pull-", ".pull.lock"
_MARGIN_BYTES = 16 * 2**20  # left free on the disk
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]  # a file's name, its bytes so far and in all


@dataclass(frozen=True, slots=True)
class Pulled:
    """What is live now, what was before, and what the server offered; `new` where this call switched."""

    model: str
    version: int
    previous: int | None
    offered: int
    new: bool


def pull(source: str, repository: Path, *, tell: Tell, progress: Progress, prune: bool = False) -> Pulled:
    """Makes the version that `source` offers (…/MODEL: its live one; …/MODEL/N: that one) the live one here.

    Nothing changes where it is live already, or where it is older than the live one and was not named. With `prune`,
    versions other than the live one and the one before are removed afterwards. Raises StillhouseError, in a line,
    where it cannot be had, does not fit on the disk or in the memory, is not what its manifest says, or does not
    answer: then what was live before stays live.
    """
    url, named = _split(source)
    number = named or _offered(url)
    text, manifest = _manifest(f"{url}/{number}", number)
    directory = repository / manifest.model
    with _sentences(directory), _alone(directory):
        live = max(_live(directory, tell), default=None)
        if live is not None and (live == number or (named is None and number < live)):
            _check_same(directory / str(number), text)
            return Pulled(manifest.model, live, previous_version(directory), number, False)
        target = directory / str(number)
        if target.is_dir():
            _check_same(target, text)
            _ask(target, live, tell)
        else:
            staged = _fetched(f"{url}/{number}", directory, manifest, text, tell, progress)
            _ask(staged, live, tell)
            _publish(staged, target, live)
        with locked(directory):
            _begin_config(directory)
            set_live_versions(directory, [number], previous=live)
        sync_directory(directory)
        if prune:
            _prune(directory, {number, previous_version(directory)}, tell)
    return Pulled(manifest.model, number, live, number, True)


def _live(directory: Path, tell: Tell) -> list[int]:
    """The versions that are live; none where one of them has been deleted, so that what is pulled becomes live."""
    try:
        return live_versions(directory)
    except VersionError as error:
        tell(f"{error}: what is pulled takes its place")
        return []


# What the server has


def _split(source: str) -> tuple[str, int | None]:
    """The address of the model, and the version where one is named; a folder here is as good as a server."""
    if found := re.match(r"\w+://[^/]*@([^/@]*)", source):
        # Not repeated here: a line of a log is no place for a password.
        raise UsageError(
            f"the address at {found[1]} holds a user name or a password, and none is sent",
            hint="leave out what stands before the '@'; let only the devices' network reach the server",
        )
    url = Path(source).resolve().as_uri() if Path(source).is_dir() else source.rstrip("/")
    if not re.match(r"(https?://[^/]+|file:///)", url):
        raise UsageError(
            f"{source!r} is neither an address nor a folder",
            hint="e.g. http://host:8080/support-int4, or a version below it",
        )
    head, _, last = url.rpartition("/")
    return (head, int(last)) if re.fullmatch(r"0*[1-9]\d{0,8}", last, re.ASCII) else (url, None)


def _offered(url: str) -> int:
    """The version that is live on the server: by its config.pbtxt, else the newest that its listing shows."""
    if (config := fetch_text(f"{url}/{CONFIG}")) is not None and (versions := named_versions(config)):
        return versions[-1]
    listing = fetch_text(f"{url}/") or ""
    if found := [int(number) for number in re.findall(r"""href=["'](?:[^"']*/)?(\d{1,9})/["']""", listing)]:
        return max(found)
    raise NotThereError(
        f"{url} tells of no version: it has neither a {CONFIG} with a version_policy nor a listing",
        hint=f"name the version: {url}/2",
    )


def _manifest(url: str, number: int) -> tuple[str, Manifest]:
    """The version's manifest, as text and read; one that is not to be trusted with a name of ours is refused."""
    text = fetch_text(f"{url}/{MANIFEST}")
    if text is None:
        raise NotThereError(f"{url} is no version: the server has no {MANIFEST} there")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise VersionError(f"{url}/{MANIFEST} does not follow schema 1: {error.errors()[0]['msg']}") from error
    names = [manifest.model, *(record.path for record in manifest.files)]
    if wrong := [name for name in names if not _SAFE_NAME.fullmatch(name) or name == MANIFEST]:
        raise VersionError(f"{url}/{MANIFEST} holds a name that is none for a file here: {wrong[0]!r}")
    if manifest.version != number:
        raise VersionError(f"{url} says that it is version {manifest.version}: versions are not renamed")
    return text, manifest


# What comes here


def _fetched(url: str, directory: Path, manifest: Manifest, text: str, tell: Tell, progress: Progress) -> Path:
    """The version in a directory of its own beside the others, fsynced; goes on with what an earlier pull left."""
    staged = directory / f"{_STAGED}{manifest.version}"
    for other in directory.glob(f"{_STAGED}*"):
        if other != staged or not _is(staged / MANIFEST, text):
            shutil.rmtree(other)
    staged.mkdir(exist_ok=True)
    write_text(staged / MANIFEST, text)
    have = sum(_size(staged / record.path) for record in manifest.files)
    need, free = sum(record.bytes for record in manifest.files) - have, shutil.disk_usage(directory).free
    if need + _MARGIN_BYTES > free:
        raise StillhouseError(
            f"{manifest.model} version {manifest.version} needs {megabytes(need)} of disk in {directory},"
            f" {megabytes(free)} are free",
            hint="free some space: versions neither live nor the one before may go; nothing has changed",
        )
    tell(f"fetching {manifest.model} version {manifest.version}, {megabytes(need)}" + (" more" if have else ""))
    for record in manifest.files:
        report = _report(progress, record.path, record.bytes)
        fetch_file(f"{url}/{record.path}", staged / record.path, record, report)
    sync_directory(staged)
    return staged


def _report(progress: Progress, name: str, size: int) -> Callable[[int], None]:
    return lambda have: progress(name, have, size)


def _ask(version: Path, live: int | None, tell: Tell) -> None:
    """Has the version answer. Raises VersionError, and removes what was only fetched; TooLittleMemory, and keeps it.

    Where it fits only once the live version has gone, whoever serves that asks this one then.
    """
    tell("asking it something")
    stays = f"version {live} stays live" if live is not None else "nothing was installed"
    try:
        check_answers(version)
    except TooLittleMemory as error:
        if live is None or not fits_instead_of(version, version.parent / str(live)):
            raise TooLittleMemory(f"{error}; {stays}", hint="end what else uses the memory, and pull again") from error
        tell(f"too little memory to ask it beside version {live}: 'edge serve' ends that one first, and asks this one")
    except VersionError as error:
        if version.name.startswith(_STAGED):
            shutil.rmtree(version)
        raise VersionError(f"{error}; {stays}", hint="build it anew, or pull another version") from error


def _publish(staged: Path, target: Path, live: int | None) -> None:
    """Gives the fetched version its number; before, it is written down which one is live."""
    directory = target.parent
    with locked(directory):
        _begin_config(directory)
        if live is not None:
            # Without a policy the newest is live: a crash after the rename would have switched already.
            set_live_versions(directory, live_versions(directory))
        staged.rename(target)
    sync_directory(directory)
    sync_directory(directory.parent)


def _begin_config(directory: Path) -> None:
    """Writes what a model's directory needs beside its versions, where that is not there."""
    for file, text in ((CONFIG, 'backend: "stillhouse"\n'), (ENGINE_JSON, "{}\n")):
        if not (directory / file).is_file():
            write_atomically(directory / file, text)


def _prune(directory: Path, kept: set[int | None], tell: Tell) -> None:
    for number in version_numbers(directory):
        if number not in kept:
            # A name with a dot is no version: what is half removed is none.
            gone = directory / f"{_STAGED}removed-{number}"
            (directory / str(number)).rename(gone)
            shutil.rmtree(gone)
            tell(f"removed version {number}")


# Files


def _alone(directory: Path) -> contextlib.AbstractContextManager[None]:
    """Only one pull of a model at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _LOCK).touch(0o644)
    return held(directory / _LOCK, StillhouseError(f"another pull into {directory} is at work", hint="wait for it"))


@contextlib.contextmanager
def _sentences(directory: Path) -> Iterator[None]:
    """A full disk or a read-only file system becomes a line; on a full disk nothing of the fetched stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            for staged in directory.glob(f"{_STAGED}*"):
                shutil.rmtree(staged, ignore_errors=True)
            raise StillhouseError(
                f"no space is left in {directory}", hint="free some; what was fetched is removed, nothing has changed"
            ) from error
        why = "is on a read-only file system" if error.errno == errno.EROFS else f"cannot be written: {error.strerror}"
        raise StillhouseError(f"{directory} {why}", hint="name another place with --repository") from error


def _check_same(version: Path, manifest_text: str) -> None:
    if version.is_dir() and not _is(version / MANIFEST, manifest_text):
        raise VersionError(
            f"{version} is there, but differs from the server's version {version.name}: versions do not change",
            hint="publish the server's under a new number",
        )


def _is(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
