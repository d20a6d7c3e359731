"""Pruned checkpoints are plain ones that say what the whole model says with those heads and layers masked."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.build import texts
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.recipe import load_recipe
from stillhouse.cli.main import run as command
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune import importance, measure_cache
from stillhouse.tune.encoding import Example
from stillhouse.tune.evaluation import evaluate
from stillhouse.tune.evaluation_recipe import load_evaluation
from stillhouse.tune.measure import Losses, Measured
from stillhouse.tune.prune import prune, verdict_of
from stillhouse.tune.prune_options import prune_options
from stillhouse.tune.settings import TuneRecipe, load_tune_recipe
from stillhouse.tune.surgery import Cut, Kept, choose_heads, cut_out, nearest_cut
from stillhouse.tune.training_run import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("family", "width", "heads", "kv_heads", "share", "cut"),
    [
        ("Llama", 576, 9, 3, 0.2, Cut(1, 0, 1 / 3)),  # SmolLM2-135M: a third is nearer to 20 % than none
        ("Qwen2", 1536, 12, 2, 0.2, Cut(1, 0, 1 / 6)),  # R1-Distill-Qwen 1.5B
        ("Qwen2", 3584, 28, 4, 0.25, Cut(0, 1, 1 / 4)),  # and 7B: a whole group is nearer than 2 of 7 in each
        ("Qwen3", 4096, 32, 8, 0.2, Cut(1, 0, 1 / 4)),  # of two as near, the one that keeps keys and values
        ("Qwen2", 512, 8, 8, 0.2, Cut(0, 2, 1 / 4)),  # without grouped queries heads are groups
        ("Llama", 4096, 32, 8, 0.5, Cut(2, 0, 1 / 2)),  # 4096 is no multiple of 24 or 28: Llama takes only 16
    ],
)
def test_the_cut_is_the_nearest_one_that_leaves_a_plain_checkpoint(
    family: str, width: int, heads: int, kv_heads: int, share: float, cut: Cut
) -> None:
    found = nearest_cut(config_of(family, width, heads, kv_heads), share)
    assert (found.heads_a_group, found.groups) == (cut.heads_a_group, cut.groups)
    assert found.share == pytest.approx(cut.share)


def test_where_none_is_nearer_than_any_cut_it_is_refused_with_what_can_go() -> None:
    with pytest.raises(UsageError, match=r"nothing near 0\.2") as refused:
        nearest_cut(config_of("Llama", 4096, 32, 8), 0.2)
    assert refused.value.hint is not None and "0.5" in refused.value.hint
    with pytest.raises(UsageError, match="nothing near"):
        nearest_cut(config_of("Llama", 64, 1, 1), 0.2)


def config_of(family: str, width: int, heads: int, kv_heads: int) -> Any:
    import transformers

    more = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 2}
    return getattr(transformers, f"{family}Config")(**more)


def test_what_matters_least_goes_evenly_within_the_groups_or_by_whole_groups() -> None:
    matters = [5.0, 1.0, 4.0, 2.0, 9.0, 3.0]
    assert choose_heads(matters, 2, Cut(1, 0, 1 / 3), 7) == Kept(7, [0, 1], [0, 2, 4, 5])
    assert choose_heads(matters, 2, Cut(0, 1, 1 / 2), 7) == Kept(7, [1], [3, 4, 5])


def model_of(family: str) -> Any:
    import torch
    import transformers

    torch.manual_seed(1)
    shape = {
        "vocab_size": 128, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.3)
    return model


def masked_logits(model: Any, ids: Any, kept: Sequence[Kept], head_dim: int = 16) -> Any:
    """Logits of the whole model whose other heads are silent and whose other layers are left out."""
    import torch

    places = {layer.layer: layer for layer in kept}
    undo = []
    for at, layer in enumerate(model.model.layers):
        if at not in places:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
            undo.append(layer)
            continue
        mask = torch.zeros(6 * head_dim)
        for head in places[at].heads:
            mask[head * head_dim : (head + 1) * head_dim] = 1
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("cut", [Cut(1, 0, 1 / 3), Cut(0, 1, 1 / 2)])
def test_the_pruned_checkpoint_says_what_the_masked_model_says(family: str, cut: Cut, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = model_of(family)
    matters = [[float((head * 7 + layer) % 5) for head in range(6)] for layer in range(3)]
    kept = [choose_heads(matters[layer], 2, cut, layer) for layer in (0, 2)]
    cut_out(model, kept).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        found = loaded(ids).logits
    assert loaded.config.num_hidden_layers == 2
    np.testing.assert_allclose(found, masked_logits(model, ids, kept), atol=1e-4)


def test_a_silent_head_and_a_silent_layer_are_found_to_matter_least() -> None:
    import torch

    model = model_of("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 4 * 16 : 5 * 16] = 0
        model.model.layers[2].self_attn.o_proj.weight[:] = 0
        model.model.layers[2].mlp.down_proj.weight[:] = 0
    examples = [Example([3, 4, at], [at + 1, at + 2, 5]) for at in range(6, 20)]
    heads = importance.head_importance(model, examples)
    assert heads[1].index(min(heads[1])) == 4 and min(heads[1]) == pytest.approx(0.0, abs=1e-9)
    layers = importance.layer_importance(model, examples)
    assert layers[2] == pytest.approx(0.0, abs=1e-6)
    assert abs(layers[0]) > 1e-3


@pytest.fixture(scope="module")
def pruned(
    tuned: tuple[Path, dict[str, Any]], tiny_base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The tuned tiny model with half of its heads and one of its two layers taken out, healed for an epoch."""
    recipe = tmp_path_factory.mktemp("prune") / "recipe.toml"
    recipe.write_text(
        f'name = "tiny"\nbase = "{tiny_base}"\nadapters = ["{tuned[0]}"]\n'
        f'[tune]\ndata = "{dataset}"\nbatch_size = 4\nlearning_rate = 5e-3\nr = 4\n[prune]\nlayers = 1\n'
        '[evaluate]\nnot_worse = ["records_perplexity"]\n',
        "utf-8",
    )
    options = prune_options({"heads": 0.5, "layers": 1, "examples": 16}, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "LEAST_TOKENS", 1_000)
        return prune(load_evaluation(recipe), load_tune_recipe(recipe), options)


@pytest.mark.slow
def test_what_evaluate_or_an_earlier_prune_measured_is_not_measured_again(
    pruned: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = pruned[0].parent / "recipe.toml"
    options = prune_options({"heads": 0.5, "examples": 4, "heal_epochs": 0, "output": str(tmp_path / "out")}, recipe)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "LEAST_TOKENS", 1_000)
    monkeypatch.setattr("stillhouse.tune.costs._ROUNDS", 1)
    evaluate(load_evaluation(recipe), [])

    def said() -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, measure_cache.__name__):
            prune(load_evaluation(recipe), load_tune_recipe(recipe), options, force=True)
        return [each.getMessage() for each in caplog.records if each.name == measure_cache.__name__]

    before = "measured before: "
    assert said() == [f"{before}whole", "measuring: pruned", f"{before}healed", f"{before}base"]  # healed: as it was
    assert said() == [f"{before}{name}" for name in ("whole", "pruned", "healed", "base")]


def test_the_result_is_a_plain_checkpoint_smaller_and_healed(pruned: tuple[Path, dict[str, Any]]) -> None:
    folder, report = pruned
    checkpoint = open_checkpoint(str(folder))  # which the build opens so
    assert checkpoint.config["num_attention_heads"] == 2 and checkpoint.config["num_hidden_layers"] == 1
    whole, cut, healed = report["models"]
    assert healed["costs"]["parameters"] < whole["costs"]["parameters"]
    assert healed["records_perplexity"]["value"] < cut["records_perplexity"]["value"]
    assert json.loads((folder / "prune.json").read_text("utf-8")) == report
    assert "perplexity" in report["verdict"]
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_the_verdict_tells_size_from_speed_and_nothing_gained_from_both() -> None:
    losses = Losses([30.0, 40.0], [10, 10])
    measured = {name: Measured(name, Losses(), Losses(), losses, [], [], [], 0) for name in ("whole", "healed")}

    def said(parameters: float, kv_bytes: float, speed: float) -> str:
        whole = {"parameters": 100.0, "kv_bytes_per_token": 100.0, "decode_tokens_per_s": 100.0}
        healed = {"parameters": parameters, "kv_bytes_per_token": kv_bytes, "decode_tokens_per_s": speed}
        return verdict_of(measured, {"whole": whole, "healed": healed})

    smaller = said(80, 50, 101)
    assert smaller.startswith("20.0% fewer parameters, 50.0% less KV cache a token; not faster (+1% decode tokens/s)")
    assert said(80, 100, 120).startswith("20.0% fewer parameters; +20% decode tokens/s; for general perplexity × 1.000")
    assert said(97, 100, 101).startswith("pruning gains nothing")


def test_a_healing_that_diverges_says_that_nothing_of_it_is_kept(
    tiny_base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(asked: TuneRecipe) -> None:
        raise Diverged("the loss is nan at step 3", f"the last good checkpoint is kept: {asked.tune.output}")

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'name = "tiny"\nbase = "{tiny_base}"\n[tune]\ndata = "{dataset}"\n', "utf-8")
    monkeypatch.setattr("stillhouse.tune.prune.tune", diverges)
    options = prune_options({"heads": 0.5, "examples": 4}, recipe)
    with pytest.raises(StillhouseError, match="the loss is nan at step 3; nothing of it is kept") as stopped:
        prune(load_recipe(recipe), load_tune_recipe(recipe), options)
    assert str(tmp_path) not in str(stopped.value)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_what_was_pruned_is_held_to_the_recipes_gate_against_the_base(
    pruned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = pruned[0], json.loads(json.dumps(pruned[1]))
    found = report["against_base"]["records_perplexity_ratio"]
    assert found["value"] != report["models"][-1]["change"]["records_perplexity_ratio"]["value"]  # not the fine-tune
    monkeypatch.setattr("stillhouse.tune.prune.prune", lambda *_, **__: (folder, report))
    recipe = str(folder.parent / "recipe.toml")
    for value, code in ((0.5, 0), (2.0, 1)):
        found |= {"value": value, "more_than_chance": True}
        assert command(["prune", recipe, "--json"]) == code
    assert "error: the pruned model does not hold its gate: perplexity, held-out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_engine_loads_what_was_pruned(pruned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from stillhouse.build.verify import read_network
    from stillhouse.build.worker import run_stage
    from stillhouse.engine.runner import OrtRunner

    folder = pruned[0]
    arguments = {"precision": "fp32", "target": "cpu", "options": {}}
    arguments |= {"checkpoint": str(folder), "destination": str(tmp_path / "graph")}
    run_stage("export", arguments, log=tmp_path / "log", share=lambda _: None)
    runner = OrtRunner(tmp_path / "graph" / "model.onnx", network=read_network(folder), slots=1, max_len=32)
    ids = list(range(5, 25))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(runner.prefill(0, ids, 0), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"head": 0.1}, "prune.head"),
        ({"heads": 1.0}, "prune.heads"),
        ({"heads": 0.0}, "nothing would go"),
        ({"layers": -1}, "prune.layers"),
    ],
)
def test_pruning_that_makes_no_sense_is_refused_by_name(table: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prune_options(table, tmp_path / "recipe.toml")
    assert words in str(refused.value)
