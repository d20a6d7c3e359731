"""The stage cache: what a stage made is kept under a hash of all that it was made from.

    $XDG_CACHE_HOME/stillhouse/stages/<stage>-<key>/     result.json (what the stage returned, sizes and hashes), files
    $XDG_CACHE_HOME/stillhouse/builds/<time>-<name>/     the log of one build
    $XDG_CACHE_HOME/stillhouse/scratch/run-…/            what one run needs while it lasts

An entry appears whole or not at all (written beside, renamed), is re-hashed before it is used, and is locked (flock)
while a build uses it. The least recently used entries go when all together are larger than STILLHOUSE_CACHE_BYTES.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stillhouse.build.locks import clear_unheld, held_temporary
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError, UsageError

log = logging.getLogger(__name__)

DEFAULT_BYTES = 20 * 10**9
_RESULT = "result.json"
_BESIDE = ".new-"
_SCRATCH = "run-"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished stage: its files' folder, what it returned, and whether it was there already."""

    path: Path
    result: dict[str, Any]
    reused: bool


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/stillhouse`, by default ~/.cache/stillhouse."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stillhouse"


def key_of(inputs: dict[str, Any]) -> str:
    """The sha256 of `inputs` as canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def scratch_in(root: Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """A folder below `root` for one run's own files, gone at its end; what dead runs left in the cache goes now.

    The entries named in `keep` (`entry_name`) stay, however full the cache is: this run is about to use them.
    Raises StillhouseError where the cache cannot be written.
    """
    folders = root / "scratch"
    with contextlib.ExitStack() as stack:
        try:
            folders.mkdir(parents=True, exist_ok=True)
            clear_unheld(folders, _SCRATCH)
            prune(root, keep=keep)
            own = stack.enter_context(held_temporary(folders, _SCRATCH))
        except OSError as failure:
            raise StillhouseError(
                f"cannot write into the cache {root}: {failure.strerror}", hint="set XDG_CACHE_HOME to another folder"
            ) from failure
        yield own


@contextlib.contextmanager
def stage_entry(
    root: Path, stage: str, key: str, make: Callable[[Path], dict[str, Any]], *, ignore: bool = False
) -> Iterator[Entry]:
    """The entry of `stage` and `key`, made by `make(folder) -> result` where it is not there (or `ignore`).

    It is held for as long as the context lasts. Of two processes that want the same one, one makes it; the other waits.
    """
    stages = root / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    name = entry_name(stage, key)
    with (stages / f"{name}.lock").open("a") as lock:
        folder = stages / name
        made = False
        while True:
            _wait_for(lock, stage)
            result = None if ignore and not made else _whole(folder)
            if result is None:
                result, made = _make(stages, folder, make), True
            os.utime(folder)
            # A lock is changed by giving it up first: somebody may have pruned the entry in between.
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.is_dir():
                break
        yield Entry(folder, result, reused=not made)


def entry_name(stage: str, key: str) -> str:
    return f"{stage}-{key[:20]}"


def is_cached(root: Path, stage: str, key: str) -> bool:
    """Whether an entry is there (not whether it is whole)."""
    return (root / "stages" / entry_name(stage, key) / _RESULT).is_file()


def prune(root: Path, limit_bytes: int | None = None, keep: Collection[str] = ()) -> None:
    """Removes what dead builds left, and the least recently used entries beyond the limit that no build holds."""
    stages = root / "stages"
    if not stages.is_dir():
        return
    clear_unheld(stages, _BESIDE)
    if limit_bytes is None:
        limit_bytes = _limit_bytes()
    found = []
    for entry in stages.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # a lock; what a neighbour just removed
            if not entry.name.startswith("."):
                found.append((entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry))
    total = 0
    for _, size, entry in sorted(found, reverse=True):
        total += size
        if total > limit_bytes and entry.name not in keep:
            _remove_unless_held(entry)


def _limit_bytes() -> int:
    asked = os.environ.get("STILLHOUSE_CACHE_BYTES") or str(DEFAULT_BYTES)
    if not asked.isdecimal():
        raise UsageError(
            f"STILLHOUSE_CACHE_BYTES is {asked!r}, no whole number of bytes", hint=f"20 GB are {DEFAULT_BYTES}"
        )
    return int(asked)


def _make(stages: Path, folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    with held_temporary(stages, _BESIDE) as beside:
        result = make(beside)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(beside.iterdir())
        }
        (beside / _RESULT).write_text(json.dumps({"result": result, "files": files}, indent=2) + "\n", "utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    return result


def _wait_for(lock: IO[str], stage: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("another process is making %s of the same inputs; waiting for it", stage)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _whole(folder: Path) -> dict[str, Any] | None:
    """What the stage returned, or None where the entry is missing or a file of it was changed."""
    try:
        record = json.loads((folder / _RESULT).read_text("utf-8"))
        for name, stamp in record["files"].items():
            file = folder / name
            if file.stat().st_size != stamp["bytes"] or sha256_of(file) != stamp["sha256"]:
                raise ValueError(f"{file} was changed")
        result: dict[str, Any] = record["result"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached %s is not whole (%s) and is made again", folder.name, error)
        return None
    return result


def _remove_unless_held(entry: Path) -> None:
    with entry.with_name(f"{entry.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(entry, ignore_errors=True)
