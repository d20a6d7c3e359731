"""A tiny fine-tune, trained on the fly, and a repository that it was built into once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.build import pipeline
from stillhouse.build.recipe import load_recipe

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def make_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a LoRA on a base, the tiny one, for `steps` (0: its delta stays zero); further words go to LoraConfig."""

    def make(*, base: Path = tiny_base, steps: int = 3, seed: int = 0, grow: int = 0, **config: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        folder = tmp_path_factory.mktemp("adapter")
        if grow:
            tokenizer = AutoTokenizer.from_pretrained(base)
            tokenizer.add_tokens([f"<new{index}>" for index in range(grow)])
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tokenizer.save_pretrained(folder)
        asked = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        peft = get_peft_model(model, LoraConfig(**(asked | config)))
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
        tokens = torch.randint(0, 1024, (2, 32))
        for _ in range(steps):
            peft(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peft.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: Callable[..., Path]) -> Path:
    return make_adapter()


@pytest.fixture(scope="session")
def write_recipe(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> WriteRecipe:
    """Writes a recipe.toml; by default the tiny base, no adapter, FP16."""

    def write(*adapters: Path | str, base: Path | str = tiny_base, precisions: str = '"fp16"', more: str = "") -> Path:
        file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
        entries = ", ".join(f'"{adapter}"' if "{" not in str(adapter) else str(adapter) for adapter in adapters)
        file.write_text(
            f'name = "tiny"\nbase = "{base}"\nadapters = [{entries}]\nprecisions = [{precisions}]\n{more}', "utf-8"
        )
        return file

    return write


@pytest.fixture(scope="session")
def tiny_recipe(write_recipe: WriteRecipe, tiny_adapter: Path) -> Path:
    """The tiny fine-tune in FP16 and INT8; its stages are cached once `built` was asked for."""
    return write_recipe(tiny_adapter, precisions='"fp16", "int8"')


@pytest.fixture(scope="session")
def built(tiny_recipe: Path, kept_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Build:
    """The tiny fine-tune, built once. Tests read it; what they change they copy with `repository`."""
    assert kept_cache
    return pipeline.build(load_recipe(tiny_recipe), tmp_path_factory.mktemp("built") / "repository")


@pytest.fixture
def repository(built: pipeline.Build, tmp_path: Path) -> Path:
    """A copy of the tiny repository that a test may change: tiny-fp16 and tiny-int8, version 1."""
    path = built.results[0].path
    assert path is not None
    return Path(shutil.copytree(path.parent.parent, tmp_path / "repository"))


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Runs `stillhouse …`; its stdout and stderr are captured."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "stillhouse.cli.main", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})

    return run


@pytest.fixture(scope="session")
def family_checkpoint(tiny_base: Path) -> Callable[..., Path]:
    """Writes a tiny random checkpoint of another family, with the tiny base's tokenizer."""

    def make(architecture: str, folder: Path, **more: Any) -> Path:
        import torch
        import transformers

        kind = architecture.removesuffix("ForCausalLM")
        shape: dict[str, Any] = {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        config = getattr(transformers, f"{kind}Config")(**(shape | more))
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms begin as ones and biases as zeros, which could be left out unseen
                    parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_base / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="session")
def graph(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in FP32."""
    from stillhouse.build.worker import run_stage

    folder = tmp_path_factory.mktemp("graph")
    arguments: dict[str, Any] = {"checkpoint": str(tiny_base), "destination": str(folder / "fp32")}
    arguments |= {"precision": "fp32", "target": "cpu", "options": {}}
    run_stage("export", arguments, log=folder / "export.log", share=lambda _: None)
    return folder / "fp32"


@pytest.fixture(scope="session")
def calibration(graph: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's own samples."""
    from stillhouse.build.calibrate import calibrate
    from stillhouse.build.verify import read_network

    folder = tmp_path_factory.mktemp("calibration")
    network = read_network(tiny_base).model_dump()
    calibrate(
        lambda _: None,
        model=str(graph / "model.onnx"),
        checkpoint=str(tiny_base),
        network=network,
        destination=str(folder),
    )
    return folder / "calibration.json"


@pytest.fixture(scope="session")
def quantized(graph: Path, tiny_base: Path, calibration: Path) -> Callable[..., dict[str, Any]]:
    """Runs the quantize stage on the tiny base; returns its record."""
    from stillhouse.build.auto import quantize
    from stillhouse.build.verify import read_network

    def run(destination: Path, **words: Any) -> dict[str, Any]:
        network = read_network(tiny_base).model_dump()
        asked: dict[str, Any] = {"bits": 4, "method": "gptq", "calibration": str(calibration)} | words
        result = quantize(
            lambda _: None,
            checkpoint=str(tiny_base),
            graph=str(graph),
            destination=str(destination),
            network=network,
            **asked,
        )
        record: dict[str, Any] = result["quantization"]
        return record

    return run
