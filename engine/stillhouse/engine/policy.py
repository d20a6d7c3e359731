"""Which versions of a model are live: `version_policy` in config.pbtxt, read and written here and nowhere else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillhouse.engine.directory import version_numbers
from stillhouse.engine.errors import VersionError

CONFIG = "config.pbtxt"
_BEGIN = re.compile(r"\bversion_policy\s*:?\s*\{")
_SPECIFIC = re.compile(r"\bspecific\s*:?\s*\{([^}]*)\}")
_LATEST = re.compile(r"\blatest\s*:?\s*\{([^}]*)\}")


def live_versions(model_directory: Path) -> list[int]:
    """The versions that Triton loads: those the policy names, or the newest where there is no policy.

    Raises VersionError where the policy names a version that is not there.
    """
    there = version_numbers(model_directory)
    config = model_directory / CONFIG
    policy, _ = _split_policy(config.read_text("utf-8") if config.is_file() else "")
    if re.search(r"\ball\b", policy):
        return there
    latest = _LATEST.search(policy)
    if latest:
        return there[-int((re.findall(r"\d+", latest.group(1)) or ["1"])[0]) :]
    specific = _SPECIFIC.search(policy)
    if specific is None:
        return there[-1:]
    named = sorted({int(number) for number in re.findall(r"\d+", specific.group(1))})
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
    _, rest = _split_policy(config.read_text("utf-8"))
    write_atomically(config, rest.rstrip("\n") + "\n" + line)


def _split_policy(text: str) -> tuple[str, str]:
    """The policy of a config.pbtxt, braces and all ("" where there is none), and the rest of its text."""
    # What a comment says is not the policy; blanked, so that places stay the same.
    plain = re.sub(r"#[^\n]*", lambda comment: " " * len(comment.group()), text)
    begin = _BEGIN.search(plain)
    if begin is None:
        return "", text
    depth, end = 1, begin.end()
    while depth and end < len(plain):
        depth += {"{": 1, "}": -1}.get(plain[end], 0)
        end += 1
    return plain[begin.start() : end], text[: begin.start()] + text[end:].lstrip("\n")


def write_atomically(file: Path, text: str) -> None:
    """Writes beside, fsyncs, renames: a reader sees the old text or the new one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(file)
