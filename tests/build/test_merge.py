"""The merge says what base and adapter said together, and writes down the proof."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build import proof
from stillhouse.build.merge import merge
from stillhouse.engine.errors import StillhouseError

TEXTS = [
    "The return of a function is the value that it hands to whoever called it, and nothing else.",
    "A class statement makes a class; its body is run in a namespace of its own, which becomes its attributes.",
]


def run_merge(base: Path, destination: Path, *adapters: Path, weights: list[float] | None = None) -> dict[str, Any]:
    given = weights or [1.0] * len(adapters)
    entries = [{"path": str(adapter), "weight": weight} for adapter, weight in zip(adapters, given, strict=True)]
    return merge(lambda _: None, base=str(base), adapters=entries, probe_texts=TEXTS, destination=str(destination))


def logits_of(folder: Path, adapter: Path | None = None, *, rows: int | None = None) -> Any:
    """Logits of fixed tokens by transformers; with the adapter attached by peft to a model of `rows` tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(0, rows or 1024, (1, 100))).logits


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        pytest.param({}, "model.layers.0.self_attn.q_proj", id="LoRA"),
        pytest.param({"use_rslora": True}, "model.layers.0.self_attn.q_proj", id="rsLoRA"),
        pytest.param({"use_dora": True}, "model.layers.1.self_attn.v_proj", id="DoRA"),
        pytest.param(
            {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
            "model.layers.1.mlp.down_proj",
            id="all-linear, patterns",
        ),
        pytest.param({"layers_to_transform": [1]}, "model.layers.1.self_attn.q_proj", id="one layer"),
        pytest.param({"init_lora_weights": "pissa"}, "model.layers.0.self_attn.q_proj", id="PiSSA"),
        pytest.param({"modules_to_save": ["norm"]}, "model.norm", id="modules_to_save"),
        pytest.param({"modules_to_save": ["lm_head"]}, "lm_head", id="tied head saved whole"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens", id="tied embedding saved whole"),
        pytest.param({"target_modules": ["q_proj", "lm_head"]}, "lm_head", id="LoRA on a tied head"),
        pytest.param({"target_modules": ["embed_tokens"]}, "model.embed_tokens", id="LoRA on a tied embedding"),
        pytest.param(
            {"target_modules": ["embed_tokens", "lm_head"]}, "model.embed_tokens", id="LoRA on both ends of a tie"
        ),
        pytest.param({"trainable_token_indices": [5, 6, 7]}, "model.embed_tokens", id="some tokens trained"),
    ],
)
def test_merged_says_what_base_and_adapter_said_together(
    config: dict[str, Any], changed: str, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make_adapter(**config)
    record = run_merge(tiny_base, tmp_path / "merged", adapter)
    attached, merged = logits_of(tiny_base, adapter), logits_of(tmp_path / "merged")
    assert float((attached - merged).abs().max()) <= 1e-4
    assert float((logits_of(tiny_base) - merged).abs().max()) > 1e-3
    assert 0 <= record["max_logit_difference"] <= 1e-4 <= record["allowed_logit_difference"] < 1e-3
    assert changed in record["modules_changed"]
    assert 1e-5 < record["relative_change_median"] <= record["relative_change_max"] < 1


def test_a_tie_that_training_kept_is_kept(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """One LoRA read at both ends: merged into each, the two differ by rounding alone."""
    from transformers import AutoConfig

    adapter = make_adapter(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    record = run_merge(tiny_base, tmp_path / "merged", adapter)
    assert "model.embed_tokens" in record["modules_changed"]
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings
    difference = logits_of(tiny_base, adapter) - logits_of(tmp_path / "merged")
    assert float(difference.abs().max()) <= 1e-4


def test_biases_that_were_trained_are_merged_where_the_base_has_them_and_refused_where_not(
    tiny_base: Path,
    make_adapter: Callable[..., Path],
    family_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = family_checkpoint("Qwen2ForCausalLM", tmp_path / "base")  # biases on q, k and v
    adapter = make_adapter(base=base, bias="lora_only", lora_bias=True)
    record = run_merge(base, tmp_path / "merged", adapter)
    assert "model.layers.0.self_attn.q_proj.bias" in record["modules_changed"]
    attached, merged = logits_of(base, adapter), logits_of(tmp_path / "merged")
    assert float((attached - merged).abs().max()) <= 1e-4
    with pytest.raises(StillhouseError, match=r"cannot be weighted by 0\.5"):
        run_merge(base, tmp_path / "half", adapter, weights=[0.5])
    with pytest.raises(StillhouseError, match=r"cannot be merged: .*the base layer has no bias"):
        run_merge(tiny_base, tmp_path / "none", make_adapter(lora_bias=True))


@pytest.mark.parametrize(
    ("config", "words"),
    [({"use_dora": True}, "is a DoRA"), ({"init_lora_weights": "pissa"}, "was begun by pissa")],
)
def test_an_adapter_whose_factors_are_not_its_change_is_merged_whole_or_not_at_all(
    config: dict[str, Any], words: str, tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """DoRA's magnitudes rescale the base, PiSSA takes its start out of it: a share of the factors is none of these."""
    with pytest.raises(StillhouseError, match=rf"{words}, whose change cannot be weighted by 0\.5"):
        run_merge(tiny_base, tmp_path / "half", make_adapter(**config), weights=[0.5])


def test_the_figures_of_a_change_are_what_plain_arithmetic_gives(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    import statistics

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = run_merge(tiny_base, tmp_path / "merged", tiny_adapter)
    old, lora = load_file(tiny_base / "model.safetensors"), load_file(tiny_adapter / "adapter_model.safetensors")
    relative = {}
    for name in [name for name in lora if "lora_A" in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = 2.0 * lora[name.replace("lora_A", "lora_B")] @ lora[name]  # lora_alpha 8, r 4
        relative[module] = float(delta.norm() / old[f"{module}.weight"].norm())
    assert record["modules_changed"] == sorted(relative)
    assert record["relative_change_max"] == pytest.approx(max(relative.values()), rel=1e-4)
    assert record["relative_change_median"] == pytest.approx(statistics.median(relative.values()), rel=1e-4)

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    windows = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :64] for text in TEXTS]
    assert record["kl_tokens"] == sum(window.shape[1] for window in windows)
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_base, tmp_path / "merged"))
    with torch.no_grad():
        p, q = (torch.cat([model(window).logits[0] for window in windows]).log_softmax(-1) for model in (base, merged))
    assert record["kl_from_base"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_adapters_are_merged_in_order_each_with_its_weight(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    adapter = make_adapter()
    run_merge(tiny_base, tmp_path / "whole", adapter)
    run_merge(tiny_base, tmp_path / "halves", adapter, adapter, weights=[0.25, 0.75])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    halves = load_file(tmp_path / "halves" / "model.safetensors")
    assert max(float((whole[name] - halves[name]).abs().max()) for name in whole) < 1e-6


def test_a_weight_scales_what_an_adapter_saved_whole_too(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    adapter = make_adapter(modules_to_save=["norm"])
    run_merge(tiny_base, tmp_path / "half", adapter, weights=[0.5])
    before, half = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.model.norm.weight"]
    expected = (before["model.norm.weight"] + saved) / 2
    assert float((half["model.norm.weight"] - expected).abs().max()) < 1e-6


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"modules_to_save": ["embed_tokens"]}, id="saved whole"),
        pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, id="both ends saved whole"),
        pytest.param({}, id="saved by peft because they grew"),
        pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="LoRA on them"),
        pytest.param({"trainable_token_indices": [1024, 1025]}, id="only the new ones trained"),
    ],
)
def test_an_adapter_that_brings_new_tokens_grows_the_vocabulary(
    config: dict[str, Any], tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    import json

    from transformers import AutoTokenizer

    adapter = make_adapter(grow=2, **config)
    run_merge(tiny_base, tmp_path / "merged", adapter)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 1026
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<new1>") == 1025
    attached, merged = logits_of(tiny_base, adapter, rows=1026), logits_of(tmp_path / "merged", rows=1026)
    assert float((attached - merged).abs().max()) <= 1e-4


def test_new_tokens_without_embeddings_are_refused(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(StillhouseError, match=r"'<new>' as token 1024, but the embedding has 1024 rows"):
        run_merge(tiny_base, tmp_path / "merged", adapter)


def test_two_that_bring_different_new_tokens_are_refused(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapters = [make_adapter(grow=grow, modules_to_save=["embed_tokens"]) for grow in (2, 3)]
    with pytest.raises(StillhouseError, match="embeddings of 1027 tokens, an adapter before it has 1026"):
        run_merge(tiny_base, tmp_path / "merged", *adapters)
    with pytest.raises(StillhouseError, match=r"brings new tokens, which have no part to be weighted by 0\.5"):
        run_merge(tiny_base, tmp_path / "merged", adapters[0], weights=[0.5])


def test_adapters_that_cancel_out_are_refused(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="together change nothing"):
        run_merge(tiny_base, tmp_path / "merged", tiny_adapter, tiny_adapter, weights=[1.0, -1.0])


def test_a_base_without_adapters_is_the_checkpoint_itself(tiny_base: Path, tmp_path: Path) -> None:
    record = run_merge(tiny_base, tmp_path / "merged")
    assert record == {"modules_changed": [], "max_logit_difference": 0.0}
    assert float((logits_of(tiny_base) - logits_of(tmp_path / "merged")).abs().max()) == 0.0


def test_a_weight_of_zero_changes_nothing_and_is_refused(tiny_base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="its weight is 0"):
        run_merge(tiny_base, tmp_path / "merged", tiny_adapter, weights=[0.0])


def test_a_change_that_is_larger_than_fp32_can_say_is_refused(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    import json

    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1e38}))
    with pytest.raises(StillhouseError, match=r"change model\.layers\.0\..* by more than FP32 can say"):
        run_merge(tiny_base, tmp_path / "merged", adapter)


def test_with_large_logits_more_is_allowed_and_written_down(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 100.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    record = run_merge(base, tmp_path / "merged", tiny_adapter)
    largest = float(logits_of(tmp_path / "merged").abs().max())
    assert record["max_logit_difference"] <= record["allowed_logit_difference"]
    assert record["allowed_logit_difference"] == pytest.approx(5e-6 * largest, rel=0.5)


def test_where_fp32_rounds_too_much_both_are_computed_in_fp64(
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The allowance is what FP32 cannot hold here, rather than the model one that FP32 cannot compute."""
    in_fp32 = run_merge(tiny_base, tmp_path / "fp32", tiny_adapter)
    monkeypatch.setattr(proof, "MAX_LOGIT_DIFFERENCE", in_fp32["max_logit_difference"] / 4)
    for rounding in ("ROUNDING", "ROUNDING_IN_FP64"):
        monkeypatch.setattr(proof, rounding, 0.0)
    in_fp64 = run_merge(tiny_base, tmp_path / "fp64", tiny_adapter)
    assert "once more in FP64" in caplog.text
    assert in_fp64["logits_in"] == "fp64" and "logits_in" not in in_fp32
    assert in_fp64["max_logit_difference"] <= in_fp32["max_logit_difference"] / 4
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("fp32", "fp64"))
    assert one == other


def test_a_wrong_merge_is_refused_in_fp64_too(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    def without_it(self: Any, **_: Any) -> Any:
        core = self.unload()
        core.model.layers[0].mlp.up_proj.weight.data *= 1.01
        return core

    monkeypatch.setattr(PeftModel, "merge_and_unload", without_it, raising=False)
    with pytest.raises(StillhouseError, match="attached and merged do not say the same"):
        run_merge(tiny_base, tmp_path / "merged", tiny_adapter)


def test_a_layer_at_a_time_in_fp64_says_what_the_whole_in_fp64_says(tiny_base: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    windows = [torch.arange(40)]
    (narrow,) = proof.logits_of(model, windows)
    (streamed,) = proof.logits_of(model, windows, in_fp64=True)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    (whole,) = proof.logits_of(model.double(), windows)
    assert torch.equal(streamed, whole) and not torch.equal(streamed, narrow)
