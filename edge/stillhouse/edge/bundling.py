"""`stillhouse edge bundle`: all that a device without a network needs, in one checksummed tar.

support-int4-2/
    install.sh  stillhouse.service  bundle.conf  SHA256SUMS
    model/support-int4/2/…
    wheels/…
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from stillhouse.edge.wheels import Target, fetch_wheels
from stillhouse.engine.directory import MANIFEST, VersionDirectory, open_version, sha256_of
from stillhouse.engine.errors import NotThereError, UsageError

_SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the tar: its name below the top folder, where it lies or what it holds, and its sha256."""

    name: str
    source: Path | bytes
    sha256: str
    executable: bool = False


def bundle(
    directory: Path,
    output: Path,
    target: Target,
    *,
    runtime: bool,
    further_wheels: Sequence[Path],
    constraints: Path | None = None,
    tell: Callable[[str], None],
) -> int:
    """Writes the bundle of the version at `directory` to `output`, which must not exist; returns its bytes.

    The wheels have the versions that were tested, or those of the file `constraints`.
    With `runtime` ONNX Runtime's wheel for the CPU comes along, else the device's own is used. Raises StillhouseError.
    """
    if output.exists():
        raise UsageError(f"{output} exists", hint="remove it, or name another with --output")
    if not output.parent.is_dir():
        raise NotThereError(f"{output.parent} is no folder", hint="make it, or name another with --output")
    if absent := [wheel for wheel in further_wheels if not wheel.is_file() or wheel.suffix != ".whl"]:
        raise UsageError(f"{absent[0]} is no wheel", hint="--wheel names a file that ends in .whl")
    if constraints is not None and not constraints.is_file():
        raise NotThereError(f"{constraints} is no file", hint="--constraints names one: name==version, a line each")
    version = open_version(directory)
    extras = ["edge", "cpu"] if runtime else ["edge"]
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=output.parent) as scratch:
        wheels = Path(scratch) / "wheels"
        tell(f"fetching wheels for Python {target.python} on {target.machine}")
        own_version = fetch_wheels(wheels, extras, target, constraints)
        for wheel in further_wheels:
            shutil.copy(wheel, wheels)
        entries = _entries(version, wheels, _conf(version, own_version, extras, target, further_wheels))
        tell(f"writing {output}")
        partial = Path(scratch) / "bundle.tar"
        _write(partial, f"{version.manifest.model}-{version.manifest.version}", entries, version)
        partial.replace(output)
    return output.stat().st_size


def _conf(
    version: VersionDirectory, own_version: str, extras: Sequence[str], target: Target, further: Sequence[Path]
) -> str:
    """What install.sh has to know, as a shell reads it."""
    values = {
        "MODEL": version.manifest.model,
        "VERSION": str(version.manifest.version),
        "STILLHOUSE_VERSION": own_version,
        "EXTRAS": ",".join(extras),
        "PYTHON_VERSION": target.python,
        "MACHINE": target.machine,
        # Without a runtime of its own the environment sees the one that the device has.
        "VENV_OPTIONS": "" if "cpu" in extras else "--system-site-packages",
        "FURTHER_WHEELS": " ".join(f"wheels/{wheel.name}" for wheel in further),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def _entries(version: VersionDirectory, wheels: Path, conf: str) -> list[Entry]:
    """The files in the order of the tar: what is small and read first comes first."""
    manifest = version.manifest
    place = f"model/{manifest.model}/{manifest.version}"
    scripts = files("stillhouse.edge") / "bundle"
    entries = [
        _of_bytes("install.sh", (scripts / "install.sh").read_bytes(), executable=True),
        _of_bytes("stillhouse.service", (scripts / "stillhouse.service").read_bytes()),
        _of_bytes("bundle.conf", conf.encode()),
        _of_bytes(f"{place}/{MANIFEST}", (version.path / MANIFEST).read_bytes()),
        # The version's files were hashed when it was opened.
        *(Entry(f"{place}/{record.path}", version.path / record.path, record.sha256) for record in manifest.files),
        *(Entry(f"wheels/{wheel.name}", wheel, sha256_of(wheel)) for wheel in sorted(wheels.glob("*.whl"))),
    ]
    sums = "".join(f"{entry.sha256}  {entry.name}\n" for entry in entries)
    return [_of_bytes(_SUMS, sums.encode()), *entries]


def _of_bytes(name: str, content: bytes, *, executable: bool = False) -> Entry:
    import hashlib

    return Entry(name, content, hashlib.sha256(content).hexdigest(), executable)


def _write(file: Path, top: str, entries: Sequence[Entry], version: VersionDirectory) -> None:
    """A tar without owners and with the version's own time: the same bytes for the same content."""
    with tarfile.open(file, "w") as tar:
        for entry in entries:
            info = tarfile.TarInfo(f"{top}/{entry.name}")
            info.mode = 0o755 if entry.executable else 0o644
            info.mtime = int(version.manifest.created.timestamp())
            if isinstance(entry.source, bytes):
                info.size = len(entry.source)
                tar.addfile(info, io.BytesIO(entry.source))
            else:
                info.size = entry.source.stat().st_size
                with entry.source.open("rb") as stream:
                    tar.addfile(info, stream)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
