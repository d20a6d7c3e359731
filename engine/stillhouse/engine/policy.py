"""Which versions of a model are live: config.pbtxt with its `version_policy`, read and written here and nowhere else.

A comment beside it remembers which one was live before, for a rollback; a file of its own would not be written in the
same moment, and Triton loads a model anew when a file that it does not know has changed.
"""

from __future__ import annotations

import re
from pathlib import Path

from stillhouse.engine.directory import version_numbers
from stillhouse.engine.durable import write_atomically
from stillhouse.engine.errors import VersionError

CONFIG = "config.pbtxt"
_OURS = "stillhouse"
_BACKEND = re.compile(r'\b(?:backend|platform)\s*:\s*(?:"([^"]*)"|\'([^\']*)\')')
_BEGIN = re.compile(r"\bversion_policy\s*:?\s*\{")
_SPECIFIC = re.compile(r"\bspecific\s*:?\s*\{([^}]*)\}")
_LATEST = re.compile(r"\blatest\s*:?\s*\{([^}]*)\}")
_PREVIOUS = re.compile(r"^# live before: (\d+)\n", re.MULTILINE)


def other_backend(model_directory: Path) -> str | None:
    """The backend or platform that Triton is to serve the model with; None where that is ours, or none is named."""
    config = model_directory / CONFIG
    text = _without_comments(config.read_text("utf-8", errors="replace")) if config.is_file() else ""
    named = {double or single for double, single in _BACKEND.findall(text)} - {""}
    return None if _OURS in named else min(named, default=None)


def live_versions(model_directory: Path) -> list[int]:
    """The versions that Triton loads: those the policy names, or the newest where there is no policy.

    Raises VersionError where the policy names a version that is not there.
    """
    there = version_numbers(model_directory)
    config = model_directory / CONFIG
    text = config.read_text("utf-8") if config.is_file() else ""
    policy, _ = _split_policy(text)
    if re.search(r"\ball\b", policy):
        return there
    latest = _LATEST.search(policy)
    if latest:
        return there[-int((re.findall(r"\d+", latest.group(1)) or ["1"])[0]) :]
    named = named_versions(text)
    if named is None:
        return there[-1:]
    if missing := [number for number in named if number not in there]:
        raise VersionError(
            f"{config} keeps version {missing[0]} live, but it does not exist",
            hint=f"versions there: {', '.join(map(str, there)) or 'none'}",
        )
    return named


def named_versions(text: str) -> list[int] | None:
    """The versions that the policy `specific` in the text of a config.pbtxt names; None where there is none."""
    specific = _SPECIFIC.search(_split_policy(text)[0])
    return sorted({int(number) for number in re.findall(r"\d+", specific.group(1))}) if specific else None


def set_live_versions(
    model_directory: Path, versions: list[int], *, previous: int | None = None, text: str | None = None
) -> None:
    """Writes the policy `specific` with `versions` into config.pbtxt, atomically; the other lines stay.

    `previous` is remembered as the version that was live before; None leaves what is remembered. `text` takes the place
    of what the file holds: an earlier one puts back what was remembered then.
    """
    config = model_directory / CONFIG
    lines = f"version_policy: {{ specific: {{ versions: [{', '.join(map(str, sorted(versions)))}] }} }}\n"
    _, rest = _split_policy(config.read_text("utf-8") if text is None else text)
    if previous is not None:
        rest, lines = _PREVIOUS.sub("", rest), f"# live before: {previous}\n{lines}"
    write_atomically(config, rest.rstrip("\n") + "\n" + lines)


def previous_version(model_directory: Path) -> int | None:
    """The version that was live before the present one; None where nothing is remembered."""
    config = model_directory / CONFIG
    found = _PREVIOUS.search(config.read_text("utf-8") if config.is_file() else "")
    return int(found.group(1)) if found else None


def _split_policy(text: str) -> tuple[str, str]:
    """The policy of a config.pbtxt, braces and all ("" where there is none), and the rest of its text."""
    plain = _without_comments(text)
    begin = _BEGIN.search(plain)
    if begin is None:
        return "", text
    depth, end = 1, begin.end()
    while depth and end < len(plain):
        depth += {"{": 1, "}": -1}.get(plain[end], 0)
        end += 1
    return plain[begin.start() : end], text[: begin.start()] + text[end:].lstrip("\n")


def _without_comments(text: str) -> str:
    """Blanked, so that places stay the same."""
    return re.sub(r"#[^\n]*", lambda comment: " " * len(comment.group()), text)
