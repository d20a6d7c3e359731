"""Unsound inputs: refused by name, exit 1, one line and a hint, no traceback, nothing in the repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.engine.errors import StillhouseError

Damage = Callable[[Path], None]


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(b"\x10\x00")


def set_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def break_json(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text('{"half": ')

    return damage


def to_pickle(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))


def poison(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    first = sorted(tensors)[0]
    tensors[first].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def rename_modules(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "qkv_pack"): tensor for name, tensor in load_file(file).items()}, file)


def widen(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(
        {name: torch.zeros(t.shape[0], 256) if "lora_A" in name else t for name, t in load_file(file).items()}, file
    )


def edit_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = next(folder.glob("*.safetensors"))
        save_file(change(load_file(file)), file, {"format": "pt"})

    return damage


def to_infinity(tensors: dict[str, Any]) -> dict[str, Any]:
    tensors[max(tensors)].view(-1)[-1] = float("inf")
    return tensors


def without(part: str) -> Damage:
    return edit_tensors(lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name})


def set_adapter_config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def point_to_lfs(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


def empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def to_integers(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.int() if "lora_A" in name else tensor for name, tensor in tensors.items()}


BASES: dict[str, tuple[Damage, str]] = {
    "no checkpoint": (remove("config.json"), "is no checkpoint: it has no config.json"),
    "no weights": (remove("model.safetensors"), "has no *.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "truncated": (truncate, "model.safetensors is truncated or broken"),
    "no header": (cut_header, "model.safetensors is truncated or broken"),
    "broken JSON": (break_json("config.json"), "config.json is not JSON"),
    "broken tokenizer": (break_json("tokenizer.json"), "tokenizer.json is not JSON"),
    "pickle": (to_pickle, "model.bin is a pickle"),
    "other family": (set_config(architectures=["MambaForCausalLM"]), "is a MambaForCausalLM, which is not supported"),
    "own code": (set_config(auto_map={"AutoConfig": "x.Y"}), "brings its own modelling code"),
    "quantized": (set_config(quantization_config={"quant_method": "awq"}), "is quantized by awq"),
    "NaN": (poison, "has NaN in"),
    "a layer missing": (without("layers.1."), "has weights of 1 layers, its config.json says 2"),
    "another vocabulary": (set_config(vocab_size=2048), "its config.json says [2048, 128]"),
    "no shape": (set_config(hidden_size=None), "says no hidden_size"),
    "LFS pointer": (point_to_lfs, "is a Git LFS pointer"),
}
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "no adapter": (remove("adapter_config.json"), "is no adapter: it has no adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "truncated": (truncate, "adapter_model.safetensors is truncated or broken"),
    "broken JSON": (break_json("adapter_config.json"), "adapter_config.json is not JSON"),
    "pickle": (to_pickle, "adapter_model.bin is a pickle"),
    "other modules": (rename_modules, "qkv_pack, a module that this base does not have"),
    "other shapes": (widen, "does not fit"),
    "half of a pair": (without("layers.0.self_attn.q_proj.lora_B"), "lora_B.weight is missing"),
    "not LoRA": (set_adapter_config(peft_type="IA3"), "is of type IA3"),
    "integers": (edit_tensors(to_integers), "lora_A.weight in I32, not in floats"),
    "empty": (edit_tensors(lambda _: {}), "holds no tensor"),
    "LFS pointer": (point_to_lfs, "is a Git LFS pointer"),
}


# Told only when the weights are loaded; whether it is the base or the adapter.
WEIGHTS: dict[str, tuple[str, Damage, str]] = {
    "inf in the base": ("base", edit_tensors(to_infinity), "has inf in"),
    "a tensor missing": ("base", without("layers.1.mlp.up_proj"), "lacks model.layers.1.mlp.up_proj.weight"),
    "NaN in the adapter": ("adapter", poison, "has NaN in"),
    "inf in the adapter": ("adapter", edit_tensors(to_infinity), "has inf in"),
    "another rank": ("adapter", set_adapter_config(r=8), "size mismatch"),
    "modules left out": ("adapter", set_adapter_config(target_modules=["q_proj"]), "adapter_config.json leaves out"),
    "a pattern that is none": ("adapter", set_adapter_config(rank_pattern={"(": 3}), "cannot be attached: "),
    "a list for patterns": ("adapter", set_adapter_config(rank_pattern=[1]), "cannot be attached: AttributeError: "),
    "other shapes": (
        "base",
        set_config(intermediate_size=300),
        "down_proj.weight as [128, 256], its config.json makes it",
    ),
    "heads that do not fit": (
        "base",
        set_config(num_attention_heads=3),
        "is not a multiple of the number of attention",
    ),
    "no tokenizer in its file": ("base", empty_tokenizer, "has one that cannot be read: KeyError: 'added_tokens'"),
    "modules promised": ("adapter", without("v_proj"), "lacks weights that its adapter_config.json promises"),
}


@pytest.mark.parametrize("damage", BASES)
def test_an_unsound_base_is_refused_by_name(
    damage: str, tiny_base: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    broken = shutil.copytree(tiny_base, tmp_path / "broken")
    apply, words = BASES[damage]
    apply(broken)
    refuses(cli, write_recipe(base=broken), tmp_path / "repository", words, str(broken))


@pytest.mark.parametrize("damage", ADAPTERS)
def test_an_unsound_adapter_is_refused_by_name(
    damage: str, tiny_adapter: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    broken = shutil.copytree(tiny_adapter, tmp_path / "broken")
    apply, words = ADAPTERS[damage]
    apply(broken)
    refuses(cli, write_recipe(broken), tmp_path / "repository", words, str(broken))


@pytest.mark.parametrize("damage", WEIGHTS)
def test_unsound_weights_are_refused_by_name_when_they_are_merged(
    damage: str, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    from stillhouse.build.merge import merge

    role, apply, words = WEIGHTS[damage]
    sound = {"base": tiny_base, "adapter": tiny_adapter}
    folders = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in sound.items()}
    apply(folders[role])
    adapters = [{"path": str(folders["adapter"]), "weight": 1.0}]
    with pytest.raises(StillhouseError) as refused:
        merge(
            lambda _: None, base=str(folders["base"]), adapters=adapters, probe_texts=["some words"],
            destination=str(tmp_path / "merged"),
        )  # fmt: skip
    assert words in str(refused.value)
    assert str(folders[role]) in str(refused.value)
    assert refused.value.hint


def test_an_adapter_that_changes_nothing_is_refused_by_name(
    make_adapter: Callable[..., Path], tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    zero = make_adapter(steps=0)
    refuses(cli, write_recipe(zero), tmp_path / "repository", "changes nothing: its delta is zero", str(zero))


def test_a_missing_folder_and_a_file_are_told_apart(
    tiny_base: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    gone = tmp_path / "gone"
    refuses(cli, write_recipe(gone), tmp_path / "repository", "adapter: no such folder", "gone", code=2)
    refuses(cli, write_recipe(base=gone), tmp_path / "repository", "base: no such folder", "gone", code=2)
    file = tiny_base / "config.json"
    refuses(cli, write_recipe(base=file), tmp_path / "repository", "is a file, not a folder", str(file))


def test_a_text_too_short_to_measure_on_is_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    recipe = write_recipe(more=f'[evaluate]\ntext = "{tmp_path / "short.txt"}"\n')
    refuses(cli, recipe, tmp_path / "repository", "fidelity needs at least", "evaluate.text")


def test_modules_of_another_base_are_refused_with_those_that_are_there_and_the_base_that_is_named(
    tiny_adapter: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    broken = shutil.copytree(tiny_adapter, tmp_path / "broken")
    rename_modules(broken)
    set_adapter_config(base_model_name_or_path="owner/another-model")(broken)
    done = refuses(cli, write_recipe(broken), tmp_path / "repository", "changes model.layers.0", "qkv_pack")
    assert "the base has: down_proj, embed_tokens, gate_proj" in done
    assert "it names owner/another-model as its base, this is base" in done


@pytest.mark.usefixtures("kept_cache")
def test_a_base_of_another_name_that_fits_is_a_warning(
    tiny_adapter: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    other = shutil.copytree(tiny_adapter, tmp_path / "other")
    set_adapter_config(base_model_name_or_path="owner/another-model")(other)
    done = cli("build", write_recipe(other), "--repository", tmp_path / "repository", "--dry-run")
    assert done.returncode == 0  # type: ignore[attr-defined]
    assert "warning: adapter other names owner/another-model as its base" in done.stderr  # type: ignore[attr-defined]
    done = cli("build", write_recipe(tiny_adapter), "--repository", tmp_path / "repository", "--dry-run")
    assert "warning" not in done.stderr  # type: ignore[attr-defined]


def test_a_repository_that_is_none_is_refused_before_anything_is_run(
    tmp_path: Path, repository: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    (tmp_path / "file").write_text("")
    for wrong, words in ((tmp_path / "file", "is a file"), (repository / "tiny-fp16", "is one model's directory")):
        done = cli("build", write_recipe(), "--repository", wrong)
        assert done.returncode == 1  # type: ignore[attr-defined]
        assert words in done.stderr  # type: ignore[attr-defined]


def refuses(
    cli: Callable[..., object], recipe: Path, repository: Path, words: str, named: str, *, code: int = 1
) -> str:
    """Builds, and checks that it was refused in the project's form; returns what was said."""
    done = cli("build", recipe, "--repository", repository)
    stderr: str = done.stderr  # type: ignore[attr-defined]
    assert done.returncode == code, stderr  # type: ignore[attr-defined]
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert words in errors[0]
    assert named in errors[0]
    assert "hint: " in stderr
    assert "Traceback" not in stderr
    assert done.stdout == ""  # type: ignore[attr-defined]
    assert not repository.exists() or list(repository.iterdir()) == []
    return stderr
