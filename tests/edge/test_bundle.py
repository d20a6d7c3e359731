"""`stillhouse edge bundle`: everything in one tar that installs without a network."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging import tags
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from stillhouse.cli.main import run
from stillhouse.edge import bundling, wheels
from stillhouse.edge.wheels import Target, fetch_wheels, missing, own_wheel, pins_for
from stillhouse.engine.errors import UsageError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str, *requires: str, version: str = "1.0") -> Path:
    file = folder / f"{name}-{version}-py3-none-any.whl"
    lines = "".join(f"Requires-Dist: {each}\n" for each in requires)
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return file


def pinned(target: Target) -> dict[str, str]:
    """The tested versions by name."""
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, pins_for(target))}


def test_what_only_an_older_python_needs_is_missed_on_that_python_alone(tmp_path: Path) -> None:
    wheel(tmp_path, "stillhouse", "edge_server ; extra == 'edge'", "torch ; extra == 'build'")
    wheel(tmp_path, "edge_server", "exceptiongroup>=1 ; python_version < '3.11'", "winapi ; sys_platform == 'win32'")
    assert missing(tmp_path, "stillhouse", ["edge"], Target("3.10", "aarch64")) == ["exceptiongroup>=1"]
    assert missing(tmp_path, "stillhouse", ["edge"], Target("3.12", "aarch64")) == []
    assert missing(tmp_path, "stillhouse", [], Target("3.10", "aarch64")) == []


def test_pip_is_told_of_every_glibc_that_the_device_has() -> None:
    options = Target("3.10", "aarch64").pip_options()
    assert "manylinux_2_35_aarch64" in options and "manylinux_2_17_aarch64" in options
    assert "manylinux_2_36_aarch64" not in options
    assert "manylinux_2_39_aarch64" in Target("3.12", "aarch64").pip_options()


def test_a_bundle_takes_the_versions_that_the_project_is_tested_with(repo_root: Path) -> None:
    """constraints.txt is of the Python that runs the tests; others need others of some, and some more."""
    lines = (repo_root / "constraints.txt").read_text("utf-8").splitlines()
    tested = {canonicalize_name(pin.name): str(pin.specifier) for pin in map(Requirement, lines)}
    here = pinned(Target("3.11", "aarch64"))
    assert {name: version for name, version in here.items() if name != "pip"} == {
        name: tested[name] for name in here if name != "pip"
    }
    assert pinned(Target("3.10", "aarch64"))["onnxruntime"] == "==1.23.2"  # the last one for it
    assert pinned(Target("3.12", "aarch64"))["onnxruntime"] == here["onnxruntime"]
    assert "exceptiongroup" in pinned(Target("3.10", "aarch64"))


@pytest.mark.slow
def test_pip_takes_the_pinned_version_for_the_boards_python_and_the_newest_of_what_is_not_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, pins = tmp_path / "index", tmp_path / "pins.txt"
    index.mkdir()
    for name in ("edge_server", "pip"):
        for version in ("1.0", "2.0", "3.0"):
            wheel(index, name, version=version)
    needs = "edge_server ; extra == 'edge'"
    monkeypatch.setattr(wheels, "own_wheel", lambda folder: wheel(folder, "stillhouse", needs))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    older, newer = "edge-server==1.0 ; python_version < '3.11'", "edge-server==2.0 ; python_version >= '3.11'"
    pins.write_text(f"# of one day\n{older}\n{newer}\n", "utf-8")
    for python, version in (("3.10", "1.0"), ("3.12", "2.0")):
        assert fetch_wheels(tmp_path / python, ["edge"], Target(python, "aarch64"), pins) == "1.0"
        taken = sorted(file.name.removesuffix("-py3-none-any.whl") for file in (tmp_path / python).glob("*.whl"))
        assert taken == [f"edge_server-{version}", "pip-3.0", "stillhouse-1.0"]


def test_what_is_no_constraints_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("numpy==1.26.4\nthe newest\n", "utf-8")
    with pytest.raises(UsageError, match=r"pins\.txt: .*the newest"):
        pins_for(Target("3.10", "aarch64"), file)
    file.write_text("", "utf-8")
    assert pins_for(Target("3.10", "aarch64"), file) == []


@pytest.mark.slow  # pip fetches the build's own requirements
def test_the_projects_own_wheel_holds_the_install_script(tmp_path: Path) -> None:
    with zipfile.ZipFile(own_wheel(tmp_path)) as archive:
        names = archive.namelist()
    assert any(name.endswith(".dist-info/METADATA") for name in names)
    beside = ("install.sh", "stillhouse.service", "constraints.txt")
    assert {f"stillhouse/edge/bundle/{name}" for name in beside} <= set(names)
    assert any(name.startswith("stillhouse/engine/") for name in names)


@pytest.fixture
def bundled(tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for this machine and Python, its wheels none but empty ones of ours; unpacked."""

    def no_network(folder: Path, extras: list[str], target: Target, constraints: Path | None) -> str:
        assert extras == ["edge", "cpu"] and target.machine == platform.machine() and constraints is None
        folder.mkdir()
        wheel(folder, "stillhouse")
        return "1.0"

    monkeypatch.setattr(bundling, "fetch_wheels", no_network)
    version, tar = tiny_repository / "tiny-fp16" / "1", tmp_path / "tiny.tar"
    options = ["-o", str(tar), "--python", PYTHON, "--machine", platform.machine()]
    assert run(["edge", "bundle", str(version), *options]) == 0
    subprocess.run(["tar", "xf", tar], cwd=tmp_path, check=True)
    return tmp_path / "tiny-fp16-1"


def test_the_tar_holds_the_version_the_wheels_and_their_sums(bundled: Path) -> None:
    names = {str(file.relative_to(bundled)) for file in bundled.rglob("*") if file.is_file()}
    assert {"install.sh", "stillhouse.service", "bundle.conf", "SHA256SUMS", "model/tiny-fp16/1/model.onnx"} <= names
    sums = (bundled / "SHA256SUMS").read_text().splitlines()
    assert {line.split("  ")[1] for line in sums} == names - {"SHA256SUMS"}
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=bundled, check=False).returncode == 0
    assert "Type=notify" in (bundled / "stillhouse.service").read_text()


def install(bundled: Path, prefix: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", "PREFIX": str(prefix), "PYTHON": sys.executable, **environment}
    command = [str(bundled / "install.sh"), "--no-service"]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)


@pytest.mark.parametrize("file", ["model/tiny-fp16/1/tokenizer.json", "bundle.conf", "SHA256SUMS"])
def test_a_damaged_bundle_is_not_installed(file: str, bundled: Path, tmp_path: Path) -> None:
    """Nor is anything of it read before, such as what the shell cannot."""
    with (bundled / file).open("a") as stream:
        stream.write("'")
    done = install(bundled, tmp_path / "prefix")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"error: this bundle is damaged: {file}", "hint: copy it here again"]
    assert not (tmp_path / "prefix").exists()


def test_another_python_or_machine_is_refused_by_name(bundled: Path, tmp_path: Path) -> None:
    for old, new, said in (
        (f"PYTHON_VERSION={PYTHON}", "PYTHON_VERSION=3.9", "is Python"),
        ("MACHINE=", "MACHINE=x", "this is"),
    ):
        conf = bundled / "bundle.conf"
        before = conf.read_text()
        conf.write_text(before.replace(old, new))
        (bundled / "SHA256SUMS").write_text("")
        subprocess.run("sha256sum bundle.conf > SHA256SUMS", shell=True, cwd=bundled, check=True)
        done = install(bundled, tmp_path / "prefix")
        assert done.returncode == 1 and said in done.stderr, done.stderr
        conf.write_text(before)


def test_a_bundle_is_not_written_over_another(tiny_repository: Path, tmp_path: Path) -> None:
    (tmp_path / "there.tar").write_text("mine")
    version = str(tiny_repository / "tiny-fp16" / "1")
    assert run(["edge", "bundle", version, "-o", str(tmp_path / "there.tar")]) == 2
    assert run(["edge", "bundle", version, "-o", str(tmp_path / "x.tar"), "--python", "3.8"]) == 2
    assert run(["edge", "bundle", version, "-o", str(tmp_path / "x.tar"), "--constraints", "nowhere.txt"]) == 2
    assert (tmp_path / "there.tar").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_installs_and_answers_without_a_network(tiny_repository: Path, tmp_path: Path) -> None:
    """The real wheels for this machine; the network is cut off while it installs."""
    tar, version = tmp_path / "tiny.tar", tiny_repository / "tiny-fp16" / "1"
    options = ["-o", str(tar), "--python", PYTHON, "--machine", platform.machine()]
    assert run(["edge", "bundle", str(version), *options]) == 0
    subprocess.run(["tar", "xf", tar], cwd=tmp_path, check=True)
    cut_off = ["unshare", "--net"] if shutil.which("unshare") and can_unshare() else []
    prefix = tmp_path / "prefix"
    command = [*cut_off, str(tmp_path / "tiny-fp16-1" / "install.sh"), "--no-service"]
    variables = {"PATH": "/usr/bin:/bin", "PREFIX": str(prefix), "PYTHON": sys.executable, "HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    program, model = prefix / "venv/bin/stillhouse", prefix / "model_repository/tiny-fp16/1"
    ask = [*cut_off, str(program), "edge", "generate", str(model), "--prompt", "one two", "--max-tokens", "4"]
    answer = subprocess.run(ask, capture_output=True, text=True, env=variables, timeout=120, check=False)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_reads_the_unit_without_a_word(bundled: Path, tmp_path: Path) -> None:
    program = tmp_path / "opt/venv/bin/stillhouse"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    text = (bundled / "stillhouse.service").read_text()
    for name, value in (("PREFIX", tmp_path / "opt"), ("MODEL", "tiny-fp16"), ("HOST", "::1"), ("PORT", 9000)):
        text = text.replace(f"@{name}@", str(value))
    unit = tmp_path / "stillhouse.service"
    unit.write_text(text.replace("@USER@", "daemon"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_wheel_of_a_bundle_is_pinned_fits_the_boards_python_and_pip_resolves_them_offline(
    python: str, tiny_repository: Path, tmp_path: Path
) -> None:
    """JetPack 6's Python and JetPack 7's, which are not emulated, and the one between."""
    version, tar = tiny_repository / "tiny-fp16" / "1", tmp_path / "tiny.tar"
    assert run(["edge", "bundle", str(version), "-o", str(tar), "--python", python]) == 0
    subprocess.run(["tar", "xf", tar], cwd=tmp_path, check=True)
    folder = tmp_path / "tiny-fp16-1" / "wheels"
    target, numbers = Target(python, "aarch64"), tuple(map(int, python.split(".")))
    platforms = [target.pip_options()[at + 1] for at, word in enumerate(target.pip_options()) if word == "--platform"]
    fitting = {
        *tags.cpython_tags(numbers, platforms=platforms),
        *tags.compatible_tags(numbers, f"cp{numbers[0]}{numbers[1]}", platforms),
    }
    names = [file.name for file in folder.glob("*.whl")]
    found = {name: f"=={version}" for name, version, *_ in map(parse_wheel_filename, names) if name != "stillhouse"}
    assert found.items() <= pinned(target).items()
    assert not [name for name in names if not fitting & parse_wheel_filename(name)[3]]
    assert any(name.startswith("onnxruntime-") and "aarch64" in name for name in names)
    # Not `install`, which holds a wheel's Requires-Python against the Python that pip runs on.
    offline = ["--no-index", "--find-links", str(folder), "--dest", str(tmp_path / "resolved")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *offline, *target.pip_options(), "stillhouse[edge,cpu]"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "resolved").iterdir()} <= set(names)


def can_unshare() -> bool:
    return subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 0
