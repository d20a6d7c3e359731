"""The behaviour and operator benchmarks run on a real version, and read what they measured right."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import behaviour
import operators
import pytest
from workload import Workload


@pytest.mark.slow
def test_a_step_is_partly_the_runtime_and_partly_python(support_repository: Path) -> None:
    version = support_repository / "support-int4/1"
    workload = Workload.of_manual(version / "tokenizer.json", seed=1)
    assert 0 < behaviour.outside_runtime_share(version, 2, workload, rows=2, steps=8) < 1


@pytest.mark.slow
def test_the_profile_names_every_kind_of_work_of_a_step(support_repository: Path) -> None:
    version = support_repository / "support-int4/1"
    spent = operators.measure(version, 2, seed=1, for_s=0.2)
    assert list(spent) == ["decode, 1 sequence", "decode, 16", "prefill, 256 tokens"]
    for of in spent.values():
        assert "GroupQueryAttention" in of and "MatMulNBits, 49152 wide" in of
        assert all(ms >= 0 for ms in of.values())
    report = {"profile": spent, "machine": {"processor": "p", "cores": 2}, "threads": 2, "measured": "today"}
    table = operators.markdown(report)
    assert "| GroupQueryAttention |" in table and "| **all, ms** |" in table
