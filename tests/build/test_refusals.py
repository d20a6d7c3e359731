"""Unsound inputs: refused by name, exit 1, one line and a hint, no traceback, nothing in the repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

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


def remove(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


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
    "quantized": (set_config(quantization_config={"quant_method": "awq"}), "is quantized already (awq)"),
    "NaN": (poison, "has NaN in"),
}
ADAPTERS: dict[str, tuple[Damage, str]] = {
    "no adapter": (remove("adapter_config.json"), "is no adapter: it has no adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "truncated": (truncate, "adapter_model.safetensors is truncated or broken"),
    "broken JSON": (break_json("adapter_config.json"), "adapter_config.json is not JSON"),
    "pickle": (to_pickle, "adapter_model.bin is a pickle"),
    "other modules": (rename_modules, "qkv_pack, a module that this base does not have"),
    "other shapes": (widen, "does not fit"),
    "NaN": (poison, "has NaN in"),
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


def test_an_adapter_that_changes_nothing_is_refused_by_name(
    make_adapter: Callable[..., Path], tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    zero = make_adapter(steps=0)
    refuses(cli, write_recipe(zero), tmp_path / "repository", "changes nothing: its delta is zero", str(zero))


def test_a_missing_folder_and_a_file_are_told_apart(
    tiny_base: Path, tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    refuses(cli, write_recipe(tmp_path / "gone"), tmp_path / "repository", "adapter: no such folder", "gone")
    file = tiny_base / "config.json"
    refuses(cli, write_recipe(base=file), tmp_path / "repository", "is a file, not a folder", str(file))


def test_a_text_too_short_to_measure_on_is_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], cli: Callable[..., object]
) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    recipe = write_recipe(more=f'[evaluate]\ntext = "{tmp_path / "short.txt"}"\n')
    refuses(cli, recipe, tmp_path / "repository", "fidelity needs at least", "evaluate.text", code=2)


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
) -> None:
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
    assert list(repository.iterdir()) == []
