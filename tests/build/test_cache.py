"""The stage cache's limit is a number of bytes, or the build says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.build.cache import entry_name, prune
from stillhouse.engine.errors import UsageError


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages").mkdir()
    monkeypatch.setenv("STILLHOUSE_CACHE_BYTES", "20GB")
    with pytest.raises(UsageError, match="STILLHOUSE_CACHE_BYTES is '20GB', no whole number of bytes"):
        prune(tmp_path)


def test_what_a_build_is_about_to_use_stays_however_full_the_cache_is(tmp_path: Path) -> None:
    names = [entry_name(stage, "0" * 64) for stage in ("merge", "fp32", "int8")]
    for at, name in enumerate(names):
        entry = tmp_path / "stages" / name
        entry.mkdir(parents=True)
        (entry / "model.onnx").write_bytes(bytes(100))
        os.utime(entry, (at, at))
    (tmp_path / "stages" / f"{names[0]}.lock").touch()
    prune(tmp_path, 150, keep=names[:1])
    assert {entry.name for entry in (tmp_path / "stages").iterdir() if entry.is_dir()} == {names[0], names[2]}
