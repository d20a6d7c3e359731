"""`stillhouse edge doctor`: a table or JSON for boards and PCs; a tiny graph tells which provider works."""

from __future__ import annotations

import importlib.abc
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse.cli.main import run
from stillhouse.edge import doctor
from stillhouse.edge.device import Device
from stillhouse.edge.doctor import Check, examine
from stillhouse.edge.fatbin import kernels_of
from stillhouse.engine import session
from stillhouse.engine.errors import EngineError
from stillhouse.engine.providers import why_not


def checks(root: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(Device(root))}


def test_a_hot_board_is_told_what_to_do(orin_nano: Path) -> None:
    found = checks(orin_nano)
    assert found["device"].found == "Jetson Orin Nano 8GB (developer kit)"
    assert found["system"].found == "JetPack 6.2, L4T 36.4.3"
    assert found["power mode"].found == "25W (mode 1)"
    assert "VDD_IN 5.00 W" in found["power"].found
    assert found["throttling"].state == "fail" and "cpu-throttle-alert" in found["throttling"].found
    assert found["temperature"].state == "fail" and "nvpmodel" in found["temperature"].advice
    # This machine's ONNX Runtime is for CPUs: on a Jetson that is worth a word.
    assert found["CUDAExecutionProvider"].state == "fail" and "JetPack" in found["CUDAExecutionProvider"].advice
    assert found["CPUExecutionProvider"].state == "ok"


def test_json_has_the_same_and_names_the_providers_that_work(
    agx_orin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edge", "doctor", "--json", "--root", str(agx_orin)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["module"] == "Jetson AGX Orin 64GB"
    assert found["power_mode"] == {"id": 3, "name": "MODE_50W"}
    assert found["providers"] == ["CPUExecutionProvider"]
    assert {check["name"] for check in found["checks"]} >= {"device", "memory", "power", "ONNX Runtime"}


def test_the_table_goes_on_on_an_ordinary_pc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLHOUSE_EDGE_ROOT", str(tmp_path))
    assert run(["edge", "doctor"]) == 0
    table = capsys.readouterr().out
    assert "no Jetson: an ordinary PC" in table
    assert "CPUExecutionProvider" in table


def test_a_terminal_that_knows_ascii_alone_gets_its_table(orin_nano: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli.main", "edge", "doctor", "--root", str(orin_nano)]
    variables = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=variables, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert b"cpu-thermal 98.5 ?C" in done.stdout and b"Traceback" not in done.stderr


def test_a_provider_that_is_not_there_is_refused_or_fallen_back_from_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert why_not("CPUExecutionProvider") is None
    assert "has no CUDAExecutionProvider" in (why_not("CUDAExecutionProvider") or "")
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        session.choose_provider("cuda", "cpu")
    assert session.choose_provider("auto", "cuda") == "cpu"
    assert "running on CPUExecutionProvider" in caplog.text


@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_provider_that_is_asked_for_and_not_there_ends_it_instead_of_falling_back(
    provider: str, name: str, support_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(support_repository / "support-int4" / "1")
    assert run(["edge", "generate", directory, "--prompt", "x", "--provider", provider]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"has no {name}ExecutionProvider" in captured.err


def test_tensorrt_has_cuda_beside_it_for_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def session_on(path: str, options: Any, providers: list[str]) -> Any:  # noqa: ARG001
        asked.append(providers)
        return SimpleNamespace(get_providers=lambda: [providers[0], "CPUExecutionProvider"])

    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [*session.PROVIDERS.values()])
    monkeypatch.setattr(session.ort, "InferenceSession", session_on)
    # What starts TensorRT and not CUDA would leave attention to the CPU: that is no session on a GPU.
    with pytest.raises(EngineError, match="CUDAExecutionProvider does not start"):
        session.open_session(Path("model.onnx"), threads=1, provider="tensorrt")
    assert asked == [["TensorrtExecutionProvider", "CUDAExecutionProvider"]]


@pytest.mark.parametrize(
    ("version", "installed", "said"),
    [
        ("1.19.2", ["onnxruntime"], "1.23.2 or newer is needed"),
        ("1.32.0", ["onnxruntime", "onnxruntime-gpu"], "they overwrite each other"),
        ("1.32.0", ["onnxruntime-gpu", "onnxruntime-genai"], ""),
        ("1.24.0.dev20260101+jp6", [], ""),  # JetPack's own, or built from the source
    ],
)
def test_a_wrong_onnx_runtime_is_told_apart(
    version: str, installed: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_distributions", lambda: iter(installed))
    check = doctor._version(SimpleNamespace(__version__=version))
    assert (check.state, said in check.advice) == ("fail" if said else "ok", True)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), "no ONNX Runtime is installed"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "cannot be imported: libcudart.so.12"),
    ],
)
def test_without_an_onnx_runtime_that_can_be_imported_a_line_says_what_to_install(
    fails: ImportError,
    said: str,
    tiny_repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: object) -> None:
            if name == "onnxruntime":
                raise fails

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    version = str(tiny_repository / "tiny-fp16" / "1")
    for command in (["generate", version, "--prompt", "x"], ["bench", version], ["serve", version], ["chat", version]):
        assert run(["edge", *command]) == 1
        captured = capsys.readouterr()
        assert said in captured.err and "JetPack's own index" in captured.err


def test_an_onnx_runtime_of_another_python_or_processor_is_a_line_too(tiny_repository: Path, tmp_path: Path) -> None:
    compiled = "onnxruntime.capi.onnxruntime_pybind11_state"
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "capi" / "__init__.py").touch()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(f"import {compiled}\n")
    version = str(tiny_repository / "tiny-fp16" / "1")
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli.main", "edge", "generate", version, "--prompt", "x"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: ONNX Runtime cannot be imported: No module named '{compiled}'\nhint: install"
    )


def entry(kind: int, architecture: int, body: bytes) -> bytes:
    head = struct.pack("<HHIQIIHHI", kind, 0, 64, len(body), 0, 0, 0, 8, architecture)
    return head.ljust(64, b"\0") + body


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_the_gpus_that_a_library_has_kernels_for(tmp_path: Path) -> None:
    library = tmp_path / "libonnxruntime_providers_cuda.so"
    desktop = container(entry(2, 80, b"code"), entry(2, 90, b"more code"), entry(1, 90, b"ptx"))
    library.write_bytes(b"\x7fELF" + b"x" * 100 + desktop + b"y" * 7 + container(entry(2, 75, b"")))
    kernels = kernels_of(library)
    assert (kernels.code, kernels.ptx) == (frozenset({75, 80, 90}), frozenset({90}))
    assert not kernels.fit(87), "a desktop's sm_80 does not run on a Tegra, nor does newer PTX"
    library.write_bytes(container(entry(2, 87, b"code")))
    assert kernels_of(library).fit(87)
    library.write_bytes(container(entry(1, 72, b"ptx")))
    assert kernels_of(library).fit(87)


@pytest.mark.parametrize("content", [b"", b"\x50\xed\x55\xba", container(b"\xff" * 80), container()[:-3]])
def test_a_library_that_makes_no_sense_has_no_kernels(tmp_path: Path, content: bytes) -> None:
    library = tmp_path / "odd.so"
    library.write_bytes(content)
    assert kernels_of(library).code == frozenset()
