"""Unusual adapters: those that cannot be had from their file are named before a weight is loaded, others are merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.adapter import open_adapter
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.merge import merge
from stillhouse.build.recipe import AdapterRef
from stillhouse.engine.errors import StillhouseError

TEXTS = ["The return of a function is the value that it hands to whoever called it, and nothing else."]


def with_config(adapter: Path, folder: Path, **changes: object) -> Path:
    """A copy of the adapter whose adapter_config.json says something else."""
    copy = Path(shutil.copytree(adapter, folder))
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    return copy


def merged(base: Path, destination: Path, adapter: Path, weight: float = 1.0) -> dict[str, Any]:
    entries = [{"path": str(adapter), "weight": weight}]
    return merge(lambda _: None, base=str(base), adapters=entries, probe_texts=TEXTS, destination=str(destination))


def logits_of(folder: Path, adapter: Path | None = None) -> Any:
    """Logits of fixed tokens by transformers, with the adapter attached by peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(0, 1024, (1, 60))).logits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alora_invocation_tokens": [5, 6]}, r"acts only behind its invocation tokens \(aLoRA\)"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "stacks the base's layers anew"),
        ({"arrow_config": {"top_k": 2}}, "is a router over other adapters"),
        ({"init_lora_weights": "pissa_niter_4"}, "was begun by pissa_niter_4, which changes the base"),
        ({"init_lora_weights": "lora_ga"}, "was begun by lora_ga"),
        ({"init_lora_weights": "corda"}, "was begun by corda"),
        ({"init_lora_weights": "LoftQ"}, "was begun by LoftQ"),
        ({"peft_type": "VERA"}, "is of type VERA; only LORA can be merged"),
    ],
)
def test_what_cannot_be_merged_from_its_file_is_refused_by_name(
    changes: dict[str, Any], words: str, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    base = open_checkpoint(str(tiny_base))
    with pytest.raises(StillhouseError, match=words) as refused:
        open_adapter(AdapterRef(path=str(with_config(tiny_adapter, tmp_path / "adapter", **changes))), base)
    assert refused.value.hint


def test_biases_of_modules_without_a_lora_are_merged(
    make_adapter: Callable[..., Path], family_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """bias = "all" trains those of k_proj too, which has no LoRA here."""
    base = family_checkpoint("Qwen2ForCausalLM", tmp_path / "base")
    adapter = make_adapter(base=base, bias="all")
    assert "model.layers.0.self_attn.k_proj.bias" in merged(base, tmp_path / "merged", adapter)["modules_changed"]
    assert float((logits_of(base, adapter) - logits_of(tmp_path / "merged")).abs().max()) <= 1e-4


def test_a_start_that_leaves_the_base_alone_may_be_weighted(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    adapter = make_adapter(init_lora_weights="orthogonal")
    merged(tiny_base, tmp_path / "half", adapter, 0.5)
    lora = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    delta = lora[f"base_model.model.{name}.lora_B.weight"] @ lora[f"base_model.model.{name}.lora_A.weight"]
    old, new = (load_file(folder / "model.safetensors")[f"{name}.weight"] for folder in (tiny_base, tmp_path / "half"))
    assert float((new - old - delta).abs().max()) < 1e-6  # lora_alpha 8 over r 4, halved


def test_what_the_installed_peft_does_not_know_is_written_down(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    adapter = with_config(tiny_adapter, tmp_path / "newer", use_tomorrow=True, tomorrow_config=None)
    warnings = merged(tiny_base, tmp_path / "merged", adapter)["warnings"]
    assert warnings == ["adapter newer: peft does not know use_tomorrow = True"]


def test_a_base_with_tensors_that_its_model_has_no_place_for(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """A bias changes what the model says; a head of another task does not, and is named."""
    import torch
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors |= {"v_head.weight": torch.ones(1, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    record = merged(base, tmp_path / "merged", tiny_adapter)
    assert record["warnings"] == ["base: v_head.weight has no place in the model and is left out"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(StillhouseError, match=r"q_proj\.bias, for which its config\.json makes no place"):
        merged(base, tmp_path / "refused", tiny_adapter)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"model_type": "gpt2"}, "says both LlamaForCausalLM and model_type 'gpt2'"),
        ("config.json", {"eos_token_id": ["x"]}, r"config\.json has \['x'\] as eos_token_id, no token id"),
        ("generation_config.json", {"bos_token_id": "<s>"}, r"generation_config\.json has '<s>' as bos_token_id"),
        ("model.safetensors.index.json", {"weight_map": {}}, "two checkpoints in one folder"),
    ],
)
def test_a_base_whose_files_contradict_each_other_is_refused_by_name(
    file: str, changes: dict[str, Any], words: str, tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    said = json.loads((base / file).read_text("utf-8")) if (base / file).is_file() else {}
    (base / file).write_text(json.dumps(said | changes), "utf-8")
    with pytest.raises(StillhouseError, match=words):
        open_checkpoint(str(base))


def test_weights_of_8_bits_without_scales_and_files_elsewhere_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({name: each.to(torch.float8_e4m3fn) for name, each in tensors.items()}, base / "model.safetensors")
    with pytest.raises(StillhouseError, match="in F8_E4M3, not in floats of 16 bits or more"):
        open_checkpoint(str(base))
    (base / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(StillhouseError, match=r"names \.\./elsewhere\.safetensors, no file beside it"):
        open_checkpoint(str(base))
