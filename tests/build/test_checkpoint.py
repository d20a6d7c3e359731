"""What a base's config.json may say: refused by name where it makes no sense, before a weight is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.merge import merge
from stillhouse.build.plan import plan
from stillhouse.build.recipe import load_recipe
from stillhouse.build.verify import read_network
from stillhouse.engine.errors import StillhouseError


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": "awq"}, "has 'awq' as quantization_config, which is no object"),
        ({"architectures": {"a": 1}}, "has architectures {'a': 1}, no list of names"),
        ({"architectures": "LlamaForCausalLM"}, "has architectures 'LlamaForCausalLM', no list of names"),
        ({"architectures": 3}, "has architectures 3, no list of names"),
        ({"architectures": [["LlamaForCausalLM"]]}, "no list of names"),
        ({"num_attention_heads": 0}, "says 0 as num_attention_heads; it is a whole number, 1 at least"),
        ({"num_hidden_layers": True}, "says True as num_hidden_layers"),
        ({"max_position_embeddings": -5}, "says -5 as max_position_embeddings"),
        ({"max_position_embeddings": 1}, "says 1 as max_position_embeddings; it is a whole number, 2 at least"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes: dict[str, Any], words: str, base: Path) -> None:
    set_config(base, **changes)
    with pytest.raises(StillhouseError) as refused:
        open_checkpoint(str(base))
    assert words in str(refused.value)
    assert str(base) in str(refused.value)


def test_a_sliding_window_is_the_context_or_is_refused(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_config(base, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16)
    assert open_checkpoint(str(base)).context_length == read_network(base).context_length == 16
    assert "its context is built as that window, 16 tokens" in caplog.text
    set_config(base, sliding_window=None)
    assert open_checkpoint(str(base)).context_length == 2048
    set_config(base, architectures=["Qwen2ForCausalLM"], model_type="qwen2", sliding_window=16, use_sliding_window=True)
    with pytest.raises(StillhouseError, match="attends through a sliding window"):
        open_checkpoint(str(base))
    set_config(base, use_sliding_window=False)
    assert open_checkpoint(str(base)).context_length == 2048


def test_json_that_is_nested_too_deep_is_refused(base: Path) -> None:
    (base / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(StillhouseError, match=r"config\.json is not JSON"):
        open_checkpoint(str(base))


def test_a_quantization_that_is_null_is_none(base: Path, tmp_path: Path) -> None:
    set_config(base, quantization_config=None)
    assert not open_checkpoint(str(base)).quantized
    merge(lambda _: None, base=str(base), adapters=[], probe_texts=["words"], destination=str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_base_that_holds_an_adapter_too_is_refused(base: Path, tiny_adapter: Path) -> None:
    """Transformers attaches an adapter that lies beside a model, though nobody asked."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tiny_adapter / name, base / name)
    with pytest.raises(StillhouseError, match="holds an adapter") as refused:
        open_checkpoint(str(base))
    assert "name it in adapters" in str(refused.value.hint)


def test_weights_in_integers_without_a_quantization_are_refused(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(StillhouseError, match=r"has model\.norm\.weight in I32, not in floats"):
        open_checkpoint(str(base))


def test_code_that_a_base_brings_is_run_only_where_the_recipe_says_so_and_leaves_none_behind(
    base: Path, tiny_adapter: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    set_config(base, auto_map=auto_map, model_type="own")
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(StillhouseError, match="brings its own modelling code") as refused:
        plan(load_recipe(write_recipe(base=base)), tmp_path / "repository")
    assert refused.value.hint is not None
    assert "trust_remote_code = true" in refused.value.hint
    trusting = load_recipe(write_recipe(tiny_adapter, base=base)).model_copy(update={"trust_remote_code": True})
    assert plan(trusting, tmp_path / "repository").base.path == base
    adapters = [{"path": str(tiny_adapter), "weight": 1.0}]
    merge(
        lambda _: None, base=str(base), adapters=adapters, probe_texts=["some words to compare on"],
        destination=str(tmp_path / "merged"), trust_remote_code=True,
    )  # fmt: skip
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert not list((tmp_path / "merged").glob("*.py"))
