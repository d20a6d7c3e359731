"""A bundle on the emulated aarch64: installed by its own script, and asked, with the network cut off.

`make arm64` runs this too. Neither the script nor what it calls knows of the emulation: its `PYTHON=` is a script.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stillhouse.cli.main import run

pytestmark = [pytest.mark.aarch64, pytest.mark.slow, pytest.mark.timeout(900)]

CONNECT = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=5).close()"
MACHINE = "import platform, sys; print(platform.machine(), '%d.%d' % sys.version_info[:2])"


@pytest.fixture(scope="module")
def cut_off() -> list[str]:
    """The beginning of a command line without a network, not even a loopback."""
    command = ["unshare", "--net"]
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the network cannot be cut off here (unshare --net needs root): {done.stderr.strip()}")
    return command


@pytest.fixture(scope="module")
def python(emulated: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sysroot's Python as a script that this machine's kernel can start.

    It tells the interpreter its own name: so an environment begins with a link to the script, as with any interpreter,
    and finds the library beside it.
    """
    prefix = tmp_path_factory.mktemp("interpreter")
    qemu, *options = emulated
    script = prefix / "bin" / "python3.11"
    script.parent.mkdir()
    (prefix / "lib").symlink_to(Path(options[-1]).parents[1] / "lib")
    # pip compiles 2,600 modules: emulated, that takes longer than all the rest, and not many of them are imported.
    emulation = "export QEMU_CPU=cortex-a76 PIP_COMPILE=0"
    script.write_text(f'#!/bin/sh\n{emulation}\nexec {qemu} -0 "$0" {shlex.join(options)} "$@"\n', "utf-8")
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def bundled(python: Path, cut_off: list[str], tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the real wheels for aarch64 and the sysroot's Python; unpacked."""
    assert python.exists() and cut_off
    folder = tmp_path_factory.mktemp("bundle")
    version, tar = tiny_repository / "tiny-fp16" / "1", folder / "tiny.tar"
    assert run(["edge", "bundle", str(version), "-o", str(tar), "--python", "3.11", "--machine", "aarch64"]) == 0
    subprocess.run(["tar", "xf", tar], cwd=folder, check=True)
    tar.unlink()
    return folder / "tiny-fp16-1"


@pytest.fixture
def port() -> Iterator[int]:
    """Somebody listens there, and is reached by whoever has a network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def call(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **variables},
        timeout=600, check=False,
    )  # fmt: skip


def test_a_bundle_installs_and_answers_on_aarch64_without_a_network(
    bundled: Path, python: Path, cut_off: list[str], port: int, tmp_path: Path
) -> None:
    assert call(python, "-c", CONNECT, str(port)).returncode == 0
    cut = call(*cut_off, python, "-c", CONNECT, str(port))
    assert cut.returncode and "Network is unreachable" in cut.stderr, cut.stderr

    prefix = tmp_path / "prefix"
    variables = {"HOME": str(tmp_path), "PREFIX": str(prefix), "PYTHON": str(python)}
    done = call(*cut_off, bundled / "install.sh", "--no-service", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    inside = prefix / "venv" / "bin"
    assert call(*cut_off, inside / "python", "-c", MACHINE).stdout.split() == ["aarch64", "3.11"]

    version = prefix / "model_repository" / "tiny-fp16" / "1"
    asked = ["edge", "generate", str(version), "--prompt", "one two", "--max-tokens", "4"]
    answer = call(*cut_off, inside / "stillhouse", *asked, HOME=str(tmp_path))
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


def test_a_changed_byte_is_refused_on_aarch64_in_a_line(
    bundled: Path, python: Path, cut_off: list[str], tmp_path: Path
) -> None:
    wheel = next(bundled.glob("wheels/onnxruntime-*.whl"))
    middle = wheel.stat().st_size // 2
    with wheel.open("r+b") as stream:
        stream.seek(middle)
        before = stream.read(1)
        stream.seek(middle)
        stream.write(bytes([before[0] ^ 1]))
    try:
        prefix = tmp_path / "prefix"
        done = call(*cut_off, bundled / "install.sh", "--no-service", PREFIX=str(prefix), PYTHON=str(python))
    finally:
        with wheel.open("r+b") as stream:
            stream.seek(middle)
            stream.write(before)
    assert done.returncode == 1 and not done.stdout
    error, hint = done.stderr.splitlines()
    assert error == f"error: this bundle is damaged: wheels/{wheel.name}" and hint.startswith("hint: ")
    assert not prefix.exists()
