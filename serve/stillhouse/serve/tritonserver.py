"""Finds a tritonserver and lays out the backend directory and the environment that it is started with.

Two installations are known: the wheel nvidia-pytriton (a server, its Python backend, and one stub for each Python),
and NVIDIA's own layout (`/opt/tritonserver/bin/tritonserver`, `/opt/tritonserver/backends/python`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.serve.errors import TritonNotFound
from stillhouse.serve.protocol import BACKEND, DRAIN_VARIABLE, OPTIONS_VARIABLE

_LIBRARY = "libtriton_python.so"
_STUB = "triton_python_backend_stub"
_UTILS = "triton_python_backend_utils.py"
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """The files of one installation: the server and the three of its Python backend."""

    binary: Path
    library: Path
    stub: Path
    utils: Path


def find_tritonserver(given: Path | None = None) -> TritonInstall:
    """The server at `given`; else the embedded one of nvidia-pytriton; else `tritonserver` on PATH.

    Raises TritonNotFound, saying what to install or which part is missing.
    """
    if given is not None:
        if not given.is_file() or not os.access(given, os.X_OK):
            raise TritonNotFound(f"{given} is not an executable file", hint="give the path of a tritonserver binary")
        return _parts(given.resolve())
    spec = importlib.util.find_spec("pytriton")
    for place in (spec.submodule_search_locations or []) if spec else []:
        embedded = Path(place) / "tritonserver" / "bin" / "tritonserver"
        if embedded.is_file():
            return _parts(embedded)
    if on_path := shutil.which("tritonserver"):
        return _parts(Path(on_path).resolve())
    raise TritonNotFound(
        "no Triton server was found: neither nvidia-pytriton nor a tritonserver on PATH",
        hint="pip install 'stillhouse[triton]', or name one with --tritonserver PATH",
    )


def _parts(binary: Path) -> TritonInstall:
    home = binary.parent.parent
    python = home / "backends" / "python"
    embedded_stubs = home / "python_backend_stubs"
    stub = (embedded_stubs / _PYTHON if embedded_stubs.is_dir() else python) / _STUB
    for part in (python / _LIBRARY, python / _UTILS, stub):
        if not part.is_file():
            raise TritonNotFound(
                f"{binary} has no Python backend for Python {_PYTHON}: {part} is missing",
                hint="use a Triton with the Python backend, and the Python that its stub was built for",
            )
    built_for = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
    if built_for and built_for[1].decode() != _PYTHON:
        raise TritonNotFound(
            f"the Python backend of {binary} embeds Python {built_for[1].decode()}, this is Python {_PYTHON}",
            hint=f"install stillhouse for Python {built_for[1].decode()} and start it from there",
        )
    return TritonInstall(binary, python / _LIBRARY, stub, python / _UTILS)


def find_libpython(directories: Sequence[Path] | None = None) -> Path:
    """The directory of the libpython that the stub embeds; this interpreter's own comes first.

    Raises TritonNotFound, naming the package to install.
    """
    name = f"libpython{_PYTHON}.so.1.0"
    for directory in _library_directories() if directories is None else directories:
        if (directory / name).is_file():
            return directory
    raise TritonNotFound(
        f"Triton's Python backend needs {name}, which this system does not have",
        hint=f"apt install libpython{_PYTHON} (Debian, Ubuntu), or take a Python built with --enable-shared",
    )


def _library_directories() -> list[Path]:
    configured = sysconfig.get_config_var("LIBDIR")
    system = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib"]
    places = [configured, f"{sys.base_prefix}/lib", *system]
    return [Path(place) for place in places if place]


def lay_out_backends(install: TritonInstall, directory: Path) -> Path:
    """Makes `directory` a Triton backend directory that knows `python` and `stillhouse`, and returns it.

    The library must be a copy (Triton refuses links that lead out of the directory), the stub must be a link (it
    finds its libraries beside its real place).
    """
    python = directory / "python"
    python.mkdir(parents=True)
    shutil.copyfile(install.library, python / _LIBRARY)
    (python / _STUB).symlink_to(install.stub)
    (python / _UTILS).symlink_to(install.utils)
    ours = directory / BACKEND
    ours.mkdir()
    shutil.copyfile(Path(__file__).parent / "backend" / "model.py", ours / "model.py")
    return directory


# glibc keeps freed memory for each of many threads, and more the larger the largest body was: what is large is mapped
# alone instead and goes back to the system when it is freed.
_GIVE_BACK = {"MALLOC_ARENA_MAX": "4", "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def server_environment(libpython: Path, engine_options_json: str, drain_file: Path) -> dict[str, str]:
    """This process's environment, so changed that the stub finds this Python, its packages and its library.

    The gateway's key is not in it: Triton and the models' processes have no use for it.
    """
    from stillhouse.gateway.gateway import KEY_VARIABLE  # here, since it loads NumPy

    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    libraries = [str(libpython), os.environ.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    environment[OPTIONS_VARIABLE] = engine_options_json
    environment[DRAIN_VARIABLE] = str(drain_file)
    return _GIVE_BACK | environment
