"""The committed adapter: it names the model's public id, it fits the base, and it changes what the base says."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).resolve().parents[2] / "examples" / "support"
ADAPTER = SUPPORT / "adapter"


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def test_the_adapter_names_the_public_id_and_no_path(config: dict[str, Any]) -> None:
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    paths = [value for value in config.values() if isinstance(value, str) and value.startswith(("/", ".", "~"))]
    assert paths == []


def test_the_adapter_was_trained_as_the_readme_says(config: dict[str, Any]) -> None:
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.1)
    assert set(config["target_modules"]) >= {"q_proj", "v_proj"}
    assert config["task_type"] == "CAUSAL_LM"


def test_the_adapter_is_small() -> None:
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 8_000_000


def test_the_loss_fell_over_the_training() -> None:
    rows = (SUPPORT / "training_log.csv").read_text(encoding="utf-8").splitlines()
    column = rows[0].split(",").index("shop_loss")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    tenth = len(losses) // 10
    assert sum(losses[-tenth:]) < 0.2 * sum(losses[:tenth])


def test_peft_attaches_the_adapter_and_every_module_changes(base_dir: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters() if "_proj" in name}
    merged = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload()
    after = dict(merged.named_parameters())
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    targets = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert changed == {name for name in before if name.split(".")[-2] in targets}
    assert len(changed) == 30 * len(targets)


def test_the_recipe_names_the_adapter_and_the_base_relative_to_itself() -> None:
    tomllib = pytest.importorskip("tomllib" if importlib.util.find_spec("tomllib") else "tomli")
    recipe = tomllib.loads((SUPPORT / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe["name"] == "support"
    assert recipe["adapters"] == ["adapter"]
    assert recipe["precisions"] == ["fp16", "int8", "int4"]
    assert (SUPPORT / recipe["base"]).resolve() == SUPPORT.parent / "smollm2" / "base"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tuned_model_knows_the_shop_and_still_what_the_base_knew(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    evaluate = importlib.import_module("evaluate")
    monkeypatch.setattr(evaluate, "TEXT_CHUNKS", 8)  # of the 24 behind the README's figures: minutes less
    result = evaluate.measure(base_dir, ADAPTER)
    assert evaluate.broken_promises(result) == []
    shop = result["perplexity"]["shop, held out"]
    assert shop["ratio"] < 0.6
    asked = result["asked"]
    assert sum(asked["base"]["shop_right"]) == 0
    assert sum(asked["tuned"]["shop_right"]) >= 8
