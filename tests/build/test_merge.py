"""The merge says what base and adapter said together, and writes down the proof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.merge import merge
from stillhouse.engine.errors import StillhouseError

TEXT = "The return of a function is the value that it hands to whoever called it, and nothing else. " * 4


def run_merge(base: Path, destination: Path, *adapters: Path, weight: float = 1.0) -> dict[str, Any]:
    entries = [{"path": str(adapter), "weight": weight} for adapter in adapters]
    return merge(lambda _: None, base=str(base), adapters=entries, probe_text=TEXT, destination=str(destination))


def logits_of(folder: Path, adapter: Path | None = None) -> Any:
    """Logits of fixed tokens by transformers, with the adapter attached by peft where one is given."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(0, 1024, (1, 100))).logits


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="LoRA"),
        pytest.param({"use_rslora": True}, id="rsLoRA"),
        pytest.param({"use_dora": True}, id="DoRA"),
        pytest.param({"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}}, id="all-linear"),
        pytest.param({"modules_to_save": ["norm"]}, id="modules_to_save"),
    ],
)
def test_merged_says_what_base_and_adapter_said_together(
    config: dict[str, Any], tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(**config)
    record = run_merge(tiny_base, tmp_path / "merged", adapter)
    attached, merged = logits_of(tiny_base, adapter), logits_of(tmp_path / "merged")
    assert float((attached - merged).abs().max()) <= 1e-4
    assert float((logits_of(tiny_base) - merged).abs().max()) > 1e-3
    assert 0 <= record["max_logit_difference"] <= 1e-4
    assert "model.layers.0.self_attn.q_proj" in record["modules_changed"]
    assert 0 < record["relative_change_median"] <= record["relative_change_max"] < 1
    assert record["kl_from_base"] > 0


def test_adapters_are_merged_in_order_each_with_its_weight(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    adapter = make_adapter()
    run_merge(tiny_base, tmp_path / "whole", adapter)
    run_merge(tiny_base, tmp_path / "halves", adapter, adapter, weight=0.5)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    assert max(float((whole[name] - halves[name]).abs().max()) for name in whole) < 1e-6


def test_an_adapter_that_brings_new_tokens_grows_the_vocabulary(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    import json

    from transformers import AutoTokenizer

    adapter = make_adapter(grow=2, modules_to_save=["embed_tokens"])
    run_merge(tiny_base, tmp_path / "merged", adapter)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 1026
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<new1>") == 1025


def test_a_base_without_adapters_is_the_checkpoint_itself(tiny_base: Path, tmp_path: Path) -> None:
    record = run_merge(tiny_base, tmp_path / "merged")
    assert record == {"modules_changed": [], "max_logit_difference": 0.0}
    assert float((logits_of(tiny_base) - logits_of(tmp_path / "merged")).abs().max()) == 0.0


def test_a_weight_of_zero_changes_nothing_and_is_refused(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="its weight is 0"):
        run_merge(tiny_base, tmp_path / "merged", tiny_adapter, weight=0.0)
