"""The lean installation in fresh environments: `.[edge,cpu]` on every Python that a board may have and that is here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # pip fetches some 70 MB for each


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12"])
def test_a_fresh_environment_answers_with_what_a_device_needs_and_no_more(
    version: str, script: Callable[[str], ModuleType], tiny_repository: Path, tmp_path: Path
) -> None:
    lean = script("lean")
    python = lean.interpreters().get(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    inside = lean.install(python, tmp_path / "environment")
    packages = lean.installed(inside)
    assert not {*lean.NOT_LEAN} & {*packages}
    if version == "3.10":
        assert packages["onnxruntime"] == "1.23.2", "the last one that JetPack 6's Python can have"
    answered = lean.start(inside, tiny_repository / "tiny-fp16" / "1", tmp_path / "cache", max_tokens=4)
    assert answered.answer.strip()
    doctor = subprocess.run(
        [inside.with_name("stillhouse"), "edge", "doctor"], capture_output=True, text=True, check=False,
        env=lean.clean(),
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stderr
    assert f"{packages['onnxruntime']} from onnxruntime" in doctor.stdout
