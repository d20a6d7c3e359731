"""Which versions of a model are live: `version_policy` in config.pbtxt, read and written here and nowhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillhouse.engine.directory import version_numbers
from stillhouse.engine.errors import VersionError

CONFIG = "config.pbtxt"
_POLICY = re.compile(r"^version_policy\s*:?\s*\{.*$\n?", re.MULTILINE)
_SPECIFIC = re.compile(r"specific\s*:?\s*\{\s*versions\s*:\s*\[([\d,\s]*)\]")


def live_versions(model_directory: Path) -> list[int]:
    """The versions that Triton loads: those the policy names, or the newest where there is no policy.

    Raises VersionError where the policy names a version that is not there.
    """
    there = version_numbers(model_directory)
    config = model_directory / CONFIG
    match = _SPECIFIC.search(config.read_text("utf-8")) if config.is_file() else None
    if match is None:
        return there[-1:]
    named = sorted(int(number) for number in match.group(1).replace(",", " ").split())
    if missing := [number for number in named if number not in there]:
        raise VersionError(
            f"{config} keeps version {missing[0]} live, but it does not exist",
            hint=f"versions there: {', '.join(map(str, there)) or 'none'}",
        )
    return named


def set_live_versions(model_directory: Path, versions: list[int]) -> None:
    """Writes the policy `specific` with `versions` into config.pbtxt, atomically; the other lines stay."""
    config = model_directory / CONFIG
    line = f"version_policy: {{ specific: {{ versions: [{', '.join(map(str, sorted(versions)))}] }} }}\n"
    rest = _POLICY.sub("", config.read_text("utf-8"))
    write_atomically(config, rest.rstrip("\n") + "\n" + line)


def write_atomically(file: Path, text: str) -> None:
    """Writes beside, fsyncs, renames: a reader sees the old text or the new one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
