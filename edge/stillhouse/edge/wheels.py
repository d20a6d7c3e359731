"""The wheels that a device without a network needs: this project's own, and all that it requires there.

Their versions are those that it was tested with (bundle/constraints.txt), so that a bundle of another day has the same.
pip chooses wheels for another machine and Python, but reads "only on Python < 3.11" and the like for the Python that
it runs on. So what it has brought is read once more with the device's answers, and what lacks is fetched too.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.engine.errors import StillhouseError, UsageError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Ubuntu 22.04 of JetPack 6 has glibc 2.35, 24.04 of JetPack 7 has 2.39: a wheel may ask for as much.
GLIBC_MINOR = {"3.10": 35, "3.11": 36, "3.12": 39}
MACHINES = ("aarch64", "x86_64")
_OLDEST_GLIBC_MINOR = 17
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Target:
    """The device's Python, e.g. 3.10, and machine."""

    python: str
    machine: str

    def __post_init__(self) -> None:
        if self.python not in GLIBC_MINOR:
            raise UsageError(f"--python is one of {', '.join(GLIBC_MINOR)}, got {self.python}")
        if self.machine not in MACHINES:
            raise UsageError(f"--machine is one of {', '.join(MACHINES)}, got {self.machine}")

    def pip_options(self) -> list[str]:
        """What makes pip choose for this target."""
        minors = range(GLIBC_MINOR[self.python], _OLDEST_GLIBC_MINOR - 1, -1)
        platforms = [f"manylinux_2_{minor}_{self.machine}" for minor in minors]
        platforms += [f"manylinux2014_{self.machine}", f"linux_{self.machine}"]
        options = [part for platform in platforms for part in ("--platform", platform)]
        return ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *options]

    def environment(self) -> dict[str, str]:
        """The answers to PEP 508's markers."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": "linux",
        }


def fetch_wheels(folder: Path, extras: Sequence[str], target: Target, constraints: Path | None = None) -> str:
    """Fills `folder` with the project's wheel, pip's, and all that both need there; returns the project's version.

    `constraints` is a file of versions in place of those that were tested; an empty one leaves the choice to pip.
    Raises StillhouseError where something has no wheel for the target, UsageError for what is no constraints file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{pin}\n" for pin in pins_for(target, constraints)), "utf-8")
    own = own_wheel(folder)
    wanted = [f"{own}[{','.join(extras)}]", "pip"]
    for _ in range(_ROUNDS):
        _pip("download", "--dest", str(folder), "--constraint", str(pins), *target.pip_options(), *wanted)
        lacking = missing(folder, "stillhouse", extras, target)
        if not lacking:
            return _metadata(own)[1]
        wanted += lacking
    raise StillhouseError(f"no end of what is needed: {', '.join(lacking)} still lack", hint="name them with --wheel")


def pins_for(target: Target, constraints: Path | None = None) -> list[str]:
    """The versions in a constraints file that hold on the target, without the markers that say so.

    Raises UsageError where it is no such file.
    """
    from packaging.requirements import InvalidRequirement

    source = constraints or files("stillhouse.edge") / "bundle" / "constraints.txt"
    lines = [line.partition("#")[0].strip() for line in source.read_text("utf-8").splitlines()]
    try:
        pins = _applying([line for line in lines if line], target.environment() | {"extra": ""})
    except InvalidRequirement as error:
        raise UsageError(f"{source}: {' '.join(str(error).split())}", hint="name==version, a line each") from None
    for pin in pins:
        pin.marker = None  # pip would ask it of the Python that it runs on
    return list(map(str, pins))


def missing(folder: Path, name: str, extras: Sequence[str], target: Target) -> list[str]:
    """Requirements of `name` with `extras`, and of theirs, that no wheel in `folder` meets on the target."""
    from packaging.utils import canonicalize_name

    requires = {canonicalize_name(found): lines for found, _, lines in map(_metadata, folder.glob("*.whl"))}
    lacking, seen, todo = (
        dict[str, None](),
        set[tuple[str, str]](),
        [(canonicalize_name(name), extra) for extra in ("", *extras)],
    )
    while todo:
        if (key := todo.pop()) in seen:
            continue
        seen.add(key)
        package, extra = key
        for requirement in _applying(requires[package], {**target.environment(), "extra": extra}):
            other = canonicalize_name(requirement.name)
            if other in requires:
                todo += [(other, each) for each in ("", *requirement.extras)]
            else:
                requirement.marker = None
                lacking[str(requirement)] = None
    return list(lacking)


def own_wheel(folder: Path) -> Path:
    """This project as a wheel: built from its checkout where it is an editable installation, else packed again."""
    distribution = importlib.metadata.distribution("stillhouse")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        source = urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path)
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), source)
        return next(folder.glob("stillhouse-*.whl"))
    return _packed_again(distribution, folder)


def _packed_again(distribution: importlib.metadata.Distribution, folder: Path) -> Path:
    """A wheel of the installed files: those of the packages, and the metadata without what the installer added."""
    wheel = folder / f"stillhouse-{distribution.version}-py3-none-any.whl"
    files = [file for file in distribution.files or () if ".." not in file.parts and file.suffix != ".pyc"]
    added = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        kept = [file for file in files if file.name not in added]
        for file in kept:
            archive.write(Path(str(file.locate())), str(file))
        record = next(str(file) for file in files if file.name == "RECORD")
        archive.writestr(record, "".join(f"{file},,\n" for file in [*map(str, kept), record]))
    return wheel


def _applying(lines: Sequence[str], environment: dict[str, str]) -> list[Requirement]:
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate(environment)]


def _metadata(wheel: Path) -> tuple[str, str, list[str]]:
    """Name, version and requirements of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        entry = next(
            name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1
        )
        headers = BytesParser().parsebytes(archive.read(entry), headersonly=True)
    return str(headers["Name"]), str(headers["Version"]), [str(line) for line in headers.get_all("Requires-Dist") or ()]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        raise StillhouseError(
            f"pip {arguments[0]} failed: {(said or ['no word'])[-1].removeprefix('ERROR: ')}",
            hint="it needs a network, once, on the machine where the bundle is made",
        )
