"""Statistics, ratios and tables of the benchmark."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import figures
import machine

SAMPLES = {
    "stillhouse": {"decode_1": [90.0, 120.0, 100.0], "ttft_1": [0.05], "perplexity": [16.0]},
    "exact": {"decode_1": [50.0], "ttft_1": [0.1], "perplexity": [16.1]},
    "lossy": {"decode_1": [200.0], "ttft_1": [0.2], "perplexity": [20.0]},
    "silent": {"decode_1": [80.0]},
}


def report() -> dict[str, object]:
    results = figures.summarise(SAMPLES)
    return {
        "ours": "stillhouse",
        "results": results,
        "ratios": figures.ratios(results, "stillhouse"),
        "settings": {"exact": {"KV cache": "FP32"}},
        "failed": {"absent": "no environment"},
        "machine": {"processor": "A processor", "cores": 2, "instruction_sets": ["avx2"]},
        "threads": 2,
        "rounds": 3,
        "seed": 0,
        "quick": False,
        "measured": "2026-01-01",
        "reference_perplexity": 15.0,
    }


def test_a_summary_is_the_median_and_the_spread() -> None:
    assert figures.summary([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0, "samples": 4}


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert figures.perplexity(20 * math.log(7.0), 20) == pytest.approx(7.0)


def test_a_ratio_above_one_is_better_for_rates_and_for_times() -> None:
    table = figures.ratios(figures.summarise(SAMPLES), "stillhouse")
    assert table["decode_1"]["best"] == "lossy" and table["decode_1"]["ratio"] == pytest.approx(0.5)
    assert table["ttft_1"]["best"] == "exact" and table["ttft_1"]["ratio"] == pytest.approx(2.0)


def test_equal_fidelity_leaves_out_who_lost_more_than_a_hundredth() -> None:
    equal = figures.ratios(figures.summarise(SAMPLES), "stillhouse")["decode_1"]["equal"]
    assert equal["best"] == "silent" and equal["ratio"] == pytest.approx(1.25)


def test_a_column_without_a_peer_has_no_ratio() -> None:
    assert "peak_rss_bytes" not in figures.ratios(
        figures.summarise({"stillhouse": {"peak_rss_bytes": [1.0]}}), "stillhouse"
    )


def test_the_table_names_medians_spread_ratio_settings_and_failures() -> None:
    table = figures.markdown(report())
    assert "| 100 (90–120) | 50 | 200 | 80 | 0.50 (lossy) | 1.25 (silent) |" in table
    assert "| 50 | 100 | 200 | – | 2.00 (exact) | 2.00 (exact) |" in table
    assert "- **exact**: KV cache: FP32" in table
    assert "**absent** did not run: no environment" in table
    assert "FP32 checkpoint's perplexity is 15.00" in table


def test_the_table_goes_between_the_markers_again_and_again() -> None:
    page = "before\n<!-- b -->\nold\n<!-- e -->\nafter\n"
    once = figures.replace_between(page, "new\n", "<!-- b -->", "<!-- e -->")
    assert once == "before\n<!-- b -->\nnew\n<!-- e -->\nafter\n"
    assert figures.replace_between(once, "new\n", "<!-- b -->", "<!-- e -->") == once


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        figures.replace_between("nothing", "new", "<!-- b -->", "<!-- e -->")


def test_the_machine_is_described_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "model name\t: A processor\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: A processor\n"
    )
    (tmp_path / "meminfo").write_text("MemTotal:       1000 kB\n")
    about = machine.describe(tmp_path / "cpuinfo", tmp_path / "meminfo")
    assert about["processor"] == "A processor" and about["memory_bytes"] == 1_024_000
    assert about["instruction_sets"] == ["avx2", "avx512f"]
    assert set(about) == {"processor", "cores", "system", "python", "instruction_sets", "memory_bytes"}
