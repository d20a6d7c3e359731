"""The stage cache's limit is a number of bytes, or the build says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.build.cache import prune
from stillhouse.engine.errors import UsageError


def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages").mkdir()
    monkeypatch.setenv("STILLHOUSE_CACHE_BYTES", "20GB")
    with pytest.raises(UsageError, match="STILLHOUSE_CACHE_BYTES is '20GB', no whole number of bytes"):
        prune(tmp_path)
