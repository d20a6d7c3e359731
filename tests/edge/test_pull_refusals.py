"""What `stillhouse edge pull` does not take: then what was live stays live."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli.main import run
from stillhouse.edge import pulling

# FileServer and AddVersion are those of conftest.py, which is not to be imported.
FileServer = Any
AddVersion = Callable[..., Path]
Pull = Callable[..., int]
Truth = Callable[[Path], tuple[list[int], list[int]]]
MODEL = "tiny-fp16"


def test_a_changed_byte_is_refused_and_the_old_one_stays(
    served: FileServer, device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pull: Pull, truth: Truth
) -> None:
    data = tmp_path / "served" / MODEL / "2" / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert pull(served, device) == 1
    said = capsys.readouterr().err
    assert "model.onnx.data is not what its manifest says" in said and "Traceback" not in said
    assert truth(device) == ([1], [1])
    assert not (device / MODEL / ".pull-2" / "model.onnx.data").exists()


def spoil(version: Path) -> None:
    (version / "model.onnx").write_bytes(b"no graph")


def test_a_version_that_does_not_answer_is_not_taken(
    served: FileServer,
    device: Path,
    tmp_path: Path,
    add_version: AddVersion,
    capsys: pytest.CaptureFixture[str],
    pull: Pull,
    truth: Truth,
) -> None:
    add_version(tmp_path / "served", 3, spoil)
    assert pull(served, device) == 1
    said = capsys.readouterr().err
    assert "does not answer" in said and "version 1 stays live" in said
    assert truth(device) == ([1], [1])
    assert not list((device / MODEL).glob(".pull-*[0-9]"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 5}, "says that it is version 5"),
        ({"model": "../evil"}, "a name that is none"),
        ({"files": [{"path": "../../x", "bytes": 1, "sha256": "0" * 64}]}, "a name that is none"),
        ({"schema": 9}, "does not follow schema 1"),
    ],
)
def test_a_manifest_that_is_not_to_be_trusted_is_refused(
    served: FileServer,
    device: Path,
    tmp_path: Path,
    change: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
    pull: Pull,
    truth: Truth,
) -> None:
    file = tmp_path / "served" / MODEL / "2" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert pull(served, device) == 1
    assert said in capsys.readouterr().err
    assert truth(device) == ([1], [1])


def test_a_version_of_the_same_number_that_differs_is_refused(
    served: FileServer, device: Path, add_version: AddVersion, capsys: pytest.CaptureFixture[str], pull: Pull
) -> None:
    version = add_version(device, 2)
    (version / "manifest.json").write_text((version / "manifest.json").read_text() + " ")
    assert pull(served, device) == 1
    assert "differs from the server's version 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("http://127.0.0.1:1/tiny-fp16", 1, "cannot be fetched"),
        ("ftp://host/x", 2, "neither an address nor a folder"),
        ("support-int4", 2, "neither an address nor a folder"),
    ],
)
def test_an_address_that_does_not_do_is_said_in_a_line(
    device: Path, source: str, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", "pull", source, "--repository", str(device)]) == code
    captured = capsys.readouterr().err
    assert said in captured and "Traceback" not in captured


@pytest.mark.parametrize(
    "source", ["http://me:secret@host:8080/m", "https://secret@host/m/2", "ftp://me:secret@host/m"]
)
def test_a_password_in_the_address_is_refused_and_not_repeated(
    device: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", "pull", source, "--repository", str(device)]) == 2
    captured = capsys.readouterr().err
    assert "the address at host" in captured and "secret" not in captured


def test_a_model_that_the_server_does_not_have_is_said_in_a_line(
    served: FileServer, device: Path, capsys: pytest.CaptureFixture[str], pull: Pull
) -> None:
    assert pull(served, device, model="nobody") == 2
    assert "tells of no version" in capsys.readouterr().err


def test_two_pulls_at_once_do_not_mix(
    served: FileServer, device: Path, capsys: pytest.CaptureFixture[str], pull: Pull
) -> None:
    with pulling._alone(device / MODEL):
        assert pull(served, device) == 1
    assert "another pull" in capsys.readouterr().err
