"""The pruning benchmark: the cut model is the masked one, and the table has a column for each model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pruning(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("pruning")


@pytest.mark.parametrize("kept", [{"0": [0, 3], "1": [1, 2]}, {"1": [0, 1, 2, 3]}], ids=["heads", "layers"])
def test_the_cut_checkpoint_has_the_logits_of_the_masked_one(
    kept: dict[str, list[int]], pruning: ModuleType, tiny_base: Path, tmp_path: Path
) -> None:
    assert pruning.masked_against_cut({"kept_heads": kept}, tiny_base, tmp_path / "cut") < 1e-4


def test_the_table_has_the_whole_model_once_and_two_columns_for_each_way(pruning: ModuleType) -> None:
    costs = {"bytes": 5e8, "kv_bytes_per_token": 46_080.0, "prefill_tokens_per_s": 900.0, "decode_tokens_per_s": 20.0}
    figures = {f"{kind}_perplexity": {"value": 12.5} for kind in ("records", "general", "text")}

    def way(heads_share: float, layers: list[int]) -> dict[str, Any]:
        cut = {"heads_share": heads_share, "layers": layers, "kept_heads": {str(at): [0] for at in range(27)}}
        models = [{"model": name, "costs": costs, **figures} for name in ("whole", "pruned", "healed")]
        return {"cut": cut, "models": models, "verdict": "smaller", "largest_logit_difference": 1e-5}

    machine = {"processor": "a CPU", "cores": 2}
    ways = {"heads": way(1 / 3, []), "layers": way(0.0, [3, 4, 5])}
    table = pruning.markdown({"measured": "2026-11-26", "machine": machine, "ways": ways})
    head = "| | whole | without 33% of the heads | the same, healed | without 3 of 30 layers | the same, healed |"
    assert table.splitlines()[0] == head
    assert "| weights, MB | 500 | 500 | 500 | 500 | 500 |" in table
    assert "- layers: smaller." in table
