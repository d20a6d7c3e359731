"""`--max-memory`: sizes as people write them, and what is served within them or refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.cli.main import run
from stillhouse.edge.memory import fit, parse_size, share_of
from stillhouse.engine.directory import open_version
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.manifest import Manifest
from stillhouse.engine.options import EngineOptions


@pytest.fixture(scope="module")
def manifest(support_repository: Path) -> Manifest:
    return open_version(support_repository / "support-int4" / "1", verify=False).manifest


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("800M", 800 * 10**6),
        ("512mib", 2**29),
        ("1 g", 10**9),
        (".5G", 5 * 10**8),
        ("1073741824", 2**30),
        ("4096 B", 4096),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "2 gigs", "-1GB", "1e9", "0", "0.0000001K", "2GBB", "i", "1ib", "٢GB", "inf"]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a size|no memory"):
        parse_size(text)


def test_a_smaller_limit_means_fewer_at_a_time_then_a_shorter_context(manifest: Manifest) -> None:
    large, middle, small = (fit(manifest, EngineOptions(), limit, None) for limit in (10**10, 8 * 10**8, 4 * 10**8))
    assert (large.max_num_seqs, large.max_model_len) == (32, 4096)
    assert 1 <= middle.max_num_seqs < 32 and middle.max_model_len == 4096
    assert small.max_num_seqs == 1 and 256 <= (small.max_model_len or 0) < 4096
    for options, limit in ((large, 10**10), (middle, 8 * 10**8), (small, 4 * 10**8)):
        assert manifest.memory.weights_bytes + (options.kv_cache_bytes or 0) < limit
        assert (options.kv_cache_bytes or 0) >= (options.max_model_len or 0) * manifest.memory.kv_bytes_per_token


def test_what_the_device_has_available_bounds_a_larger_limit(manifest: Manifest) -> None:
    assert fit(manifest, EngineOptions(), 10**10, 4 * 10**8) == fit(manifest, EngineOptions(), 4 * 10**8, None)


def test_without_a_limit_nothing_is_changed_but_what_cannot_fit_is_refused(manifest: Manifest) -> None:
    options = EngineOptions(max_num_seqs=3)
    assert fit(manifest, options, None, 10**10) is options
    with pytest.raises(StillhouseError, match="the device has available 200 MB"):
        fit(manifest, options, None, 2 * 10**8)


def test_a_context_that_was_asked_for_is_not_shortened_silently(manifest: Manifest) -> None:
    with pytest.raises(StillhouseError, match=r"--max-model-len 8000 needs .* tokens"):
        fit(manifest, EngineOptions(max_model_len=8000), 5 * 10**8, None)


def test_models_share_what_the_process_leaves() -> None:
    assert share_of(10**9, 1) == 10**9
    assert 2 * share_of(10**9, 2) > 10**9


def test_the_command_says_what_it_derived(support_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(support_repository / "support-int4" / "1")
    assert run(["edge", "generate", directory, "-p", "Hi", "--max-tokens", "2", "--max-memory", "600MB"]) == 0
    assert "within 600 MB: context" in capsys.readouterr().err


def test_too_little_is_refused_with_figures_before_loading(
    support_repository: Path, orin_nano: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = str(support_repository / "support-int4" / "1")
    assert run(["edge", "serve", directory, "--port", "0", "--max-memory", "150MB"]) == 1
    assert "--max-memory allows 150 MB" in capsys.readouterr().err
    (orin_nano / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 100000 kB\n")
    monkeypatch.setenv("STILLHOUSE_EDGE_ROOT", str(orin_nano))
    assert run(["edge", "generate", directory, "-p", "Hi"]) == 1
    assert "the device has available 102 MB" in capsys.readouterr().err


def test_a_bad_size_is_wrong_usage(support_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = str(support_repository / "support-int4" / "1")
    assert run(["edge", "generate", directory, "-p", "Hi", "--max-memory", "lots"]) == 2
    assert "'lots' is not a size of memory" in capsys.readouterr().err
