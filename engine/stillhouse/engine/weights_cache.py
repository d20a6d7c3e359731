"""Weights as the CPU's kernels want them, kept on disk and mapped: load in less time, and share the memory.

ONNX Runtime repacks a model's weights at every start, into anonymous memory of each process. Saved once, the packed
form is mapped instead: pages that the processes share and the system can reclaim. It fits one machine's kernels, so
it is a cache beside the version, never a part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from stillhouse.engine.directory import MODEL, VersionDirectory, sha256_of
from stillhouse.engine.durable import write_atomically

log = logging.getLogger(__name__)

STAMP = "stamp.json"
DATA = "model.onnx.data"
FORMAT = 1
# How many packed models are kept; the one unused for longest goes first.
KEEP = 8
LEFTOVER_S = 3600.0


def prepacked_model(version: VersionDirectory, pack: Callable[[Path, Path], None], runtime: str) -> Path:
    """The path of a packed model.onnx for `version`, or of the version's own where there can be none.

    `pack(model, target)` writes the packed form of `model` to `target`. `runtime` names what the form belongs to
    beside this CPU (ONNX Runtime's version). A full disk, a read-only home or a failing `pack` is said in the log.
    """
    key = _key(version, runtime)
    entry = _root() / key
    try:
        if _is_whole(entry, key):
            os.utime(entry / STAMP)
            return entry / MODEL
        return _make(version, pack, entry, key)
    except Exception as error:  # a cache must never be the reason that a model does not load
        log.warning("no packed weights for %s: %s", version.manifest.model, error)
        return version.model_path


def is_packed(model_path: Path) -> bool:
    """Whether `model_path` is one of this cache: a graph that is optimized already."""
    return (model_path.parent / STAMP).is_file()


def remembered(model_path: Path, name: str, find: Callable[[], bool]) -> bool:
    """What `find` says of a packed model, kept beside it: it too fits one machine's kernels. Others are asked anew."""
    if not is_packed(model_path):
        return find()
    file = model_path.with_name(name)
    answers = {b"yes": True, b"no": False}
    with contextlib.suppress(OSError, KeyError):
        return answers[file.read_bytes()]
    found = find()
    with contextlib.suppress(OSError):
        write_atomically(file, "yes" if found else "no")
    return found


def _make(version: VersionDirectory, pack: Callable[[Path, Path], None], entry: Path, key: str) -> Path:
    """Packs into a folder beside, stamps it, renames it into place; another process may do the same at once."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{entry.name[:12]}-", dir=entry.parent))
    try:
        pack(version.model_path, beside / MODEL)
        for name in (MODEL, DATA):
            # Whose power is lost now must not find weights of the right size and another content.
            with (beside / name).open("rb") as file:
                os.fsync(file.fileno())
        stamp = {"key": key, "files": _marks(beside), "graph_sha256": sha256_of(beside / MODEL)}
        (beside / STAMP).write_text(json.dumps(stamp), "utf-8")
        if entry.exists() and not _is_whole(entry, key):
            shutil.rmtree(entry)
        try:
            beside.rename(entry)
        except OSError:
            # Another process was first: what it made is as good.
            if not _is_whole(entry, key):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _prune(entry.parent)
    return entry / MODEL


def _is_whole(entry: Path, key: str) -> bool:
    """Whether `entry` was made for `key`, and its files are as they were left: none missing, cut short, written to."""
    try:
        stamp = json.loads((entry / STAMP).read_text("utf-8"))
        return bool(
            stamp["key"] == key
            and stamp["files"] == _marks(entry)
            and stamp["graph_sha256"] == sha256_of(entry / MODEL)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _marks(entry: Path) -> dict[str, list[int]]:
    """Of each file its bytes and when it was written to: to hash gigabytes would take longer than to pack them."""
    found = {name: (entry / name).stat() for name in (MODEL, DATA)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _key(version: VersionDirectory, runtime: str) -> str:
    """What the packed form depends on: the weights, ONNX Runtime, and the CPU whose kernels it is for."""
    files = sorted((record.path, record.sha256) for record in version.manifest.files if record.path.startswith(MODEL))
    parts = [str(FORMAT), runtime, platform.machine(), _cpu(), json.dumps(files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _cpu() -> str:
    """The lines of /proc/cpuinfo that name the processor and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    named = ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(named)}))


def _prune(root: Path) -> None:
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".") and (entry / STAMP).is_file()]
    entries.sort(key=lambda entry: (entry / STAMP).stat().st_mtime, reverse=True)
    for entry in entries[KEEP:]:
        # A process that has it mapped keeps its pages.
        shutil.rmtree(entry, ignore_errors=True)
    for leftover in root.glob(".*-*"):  # of a process that was killed while it packed
        if leftover.stat().st_mtime < time.time() - LEFTOVER_S:
            shutil.rmtree(leftover, ignore_errors=True)


def _root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "stillhouse" / "prepacked"
