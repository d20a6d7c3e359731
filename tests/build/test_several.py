"""Several adapters: each one's change is added to the base, also where an adapter carries a weight whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.merge import merge
from stillhouse.engine.errors import StillhouseError

EMBEDDING = "model.embed_tokens.weight"
TEXTS = ["The return of a function is the value that it hands to whoever called it, and nothing else."]


def changes(base: Path, destination: Path, *adapters: Path, weights: list[float] | None = None) -> dict[str, Any]:
    """What the merge of `adapters` changed in each weight; a tied head is the embedding."""
    from safetensors.torch import load_file

    given = weights or [1.0] * len(adapters)
    entries = [{"path": str(adapter), "weight": weight} for adapter, weight in zip(adapters, given, strict=True)]
    merge(lambda _: None, base=str(base), adapters=entries, probe_texts=TEXTS, destination=str(destination))
    old, new = load_file(base / "model.safetensors"), load_file(destination / "model.safetensors")
    old.setdefault("lm_head.weight", old[EMBEDDING])
    new.setdefault("lm_head.weight", new[EMBEDDING])
    return {name: new[name][: len(tensor)] - tensor for name, tensor in old.items()}


@pytest.mark.parametrize(
    ("first", "second", "changed"),
    [
        pytest.param(
            {"target_modules": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}, EMBEDDING, id="LoRA on it"
        ),
        pytest.param(
            {"modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}, "model.norm.weight", id="saved whole"
        ),
        pytest.param(
            {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}, EMBEDDING, id="one of each"
        ),
        pytest.param(
            {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, "lm_head.weight", id="a tied head"
        ),
        pytest.param(
            {"trainable_token_indices": [5, 6]}, {"trainable_token_indices": [6, 7]}, EMBEDDING, id="some tokens"
        ),
    ],
)
def test_two_changes_of_one_weight_are_added_up(
    first: dict[str, Any],
    second: dict[str, Any],
    changed: str,
    tiny_base: Path,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapters = [make_adapter(seed=1, **first), make_adapter(seed=2, **second)]
    one, other = (changes(tiny_base, tmp_path / adapter.name, adapter) for adapter in adapters)
    both = changes(tiny_base, tmp_path / "both", *adapters)
    assert float(one[changed].norm()) > 0.01
    assert float(other[changed].norm()) > 0.01
    assert max(float((both[name] - one[name] - other[name]).abs().max()) for name in both) < 1e-5


def test_two_biases_are_added_up(
    family_checkpoint: Callable[..., Path], make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    base = family_checkpoint("Qwen2ForCausalLM", tmp_path / "base")
    adapters = [make_adapter(base=base, seed=seed, bias="lora_only") for seed in (1, 2)]
    one, other = (changes(base, tmp_path / adapter.name, adapter) for adapter in adapters)
    both = changes(base, tmp_path / "both", *adapters)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert float(one[name].norm()) > 0.01
    assert float((both[name] - one[name] - other[name]).abs().max()) < 1e-6


def test_a_weight_scales_an_embedding_that_the_adapter_carries_beside_its_products(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """As peft's save_embedding_layers=True writes it: no module is wrapped for it."""
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    file = adapter / "adapter_model.safetensors"
    own = load_file(tiny_base / "model.safetensors")[EMBEDDING]
    save_file({**load_file(file), f"base_model.model.{EMBEDDING}": 1.1 * own}, file, {"format": "pt"})
    half = changes(tiny_base, tmp_path / "half", adapter, weights=[0.5])
    assert float((half[EMBEDDING] - 0.05 * own).abs().max()) < 1e-6


def test_rows_of_new_tokens_that_two_adapters_bring_must_be_the_same(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    one, other = (make_adapter(seed=seed, grow=2, modules_to_save=["embed_tokens"]) for seed in (1, 2))
    with pytest.raises(StillhouseError, match="of new tokens that an adapter before it has brought"):
        changes(tiny_base, tmp_path / "other", one, other)
    once, twice = (changes(tiny_base, tmp_path / str(times), *[one] * times) for times in (1, 2))
    assert float((twice[EMBEDDING] - 2 * once[EMBEDDING]).abs().max()) < 1e-6


def test_an_adapter_that_was_begun_from_the_base_comes_first(
    tiny_base: Path, tiny_adapter: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """PiSSA takes the strongest directions out of the weight that it meets: the base's, when it was trained."""
    begun = make_adapter(init_lora_weights="pissa")
    with pytest.raises(StillhouseError, match="was begun by pissa, whose change cannot be added to another adapter's"):
        changes(tiny_base, tmp_path / "second", tiny_adapter, begun)
    one, other = (changes(tiny_base, tmp_path / adapter.name, adapter) for adapter in (begun, tiny_adapter))
    both = changes(tiny_base, tmp_path / "first", begun, tiny_adapter)
    assert max(float((both[name] - one[name] - other[name]).abs().max()) for name in both) < 1e-5
