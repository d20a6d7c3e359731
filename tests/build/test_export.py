"""The FP32 export is transformers' model, FP16 keeps its cache in half, and other runtimes open the versions."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.export import refuse_another_model
from stillhouse.build.texts import evaluation_text, token_ids, token_windows
from stillhouse.build.verify import divergence, log_softmax, read_network
from stillhouse.build.worker import run_stage
from stillhouse.engine.errors import StillhouseError
from stillhouse.engine.runner import OrtRunner

# FP32 on both sides; the largest logits are about 40, so this is 7 parts in a million.
MAX_DIFFERENCE = 3e-4


@pytest.fixture(scope="module")
def real_windows(base_dir: Path) -> list[list[int]]:
    """Three windows of 512 tokens of English."""
    return token_windows(token_ids(evaluation_text(None), base_dir / "tokenizer.json"), 8192)[::6]


@pytest.fixture(scope="module")
def fp32(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real base, exported in FP32."""
    folder = tmp_path_factory.mktemp("fp32")
    arguments: dict[str, Any] = {"checkpoint": str(base_dir), "destination": str(folder / "model")}
    arguments |= {"precision": "fp32", "target": "cpu", "options": {}}
    run_stage("export", arguments, log=folder / "export.log", share=lambda _: None)
    return folder / "model"


@pytest.mark.slow
def test_the_fp32_export_says_what_transformers_says(fp32: Path, base_dir: Path, real_windows: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    runner = OrtRunner(fp32 / "model.onnx", network=read_network(base_dir), slots=1, max_len=512)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    difference = 0.0
    for window in real_windows:
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([window])).logits[0].numpy()
        logits = runner.prefill(0, window, 0)
        assert (logits.argmax(-1) == expected.argmax(-1)).all()
        difference = max(difference, float(np.abs(logits - expected).max()))
    print(f"largest difference of a logit: {difference:.2g}")
    assert difference <= MAX_DIFFERENCE


@pytest.mark.slow
def test_the_fp16_conversion_halves_weights_and_cache_and_keeps_float_logits(
    fp32: Path, base_dir: Path, real_windows: list[list[int]], tmp_path: Path
) -> None:
    arguments = {"source": str(fp32), "destination": str(tmp_path / "fp16")}
    run = run_stage("convert_fp16", arguments, log=tmp_path / "log", share=lambda _: None)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (tmp_path / "fp16", fp32)]
    assert run.peak_rss_bytes < sizes[1]  # the libraries and the largest weight, never all weights
    assert sizes[0] <= 0.51 * sizes[1]
    network = read_network(base_dir)
    half = OrtRunner(tmp_path / "fp16" / "model.onnx", network=network, slots=2, max_len=512)
    whole = OrtRunner(fp32 / "model.onnx", network=network, slots=2, max_len=512)
    assert half.cache.dtype == np.float16
    prompts = [real_windows[0][:40], real_windows[1][:61]]
    for runner in (half, whole):
        for slot, prompt in enumerate(prompts):
            runner.prefill(slot, prompt, 0)
    lengths = [len(prompt) for prompt in prompts]
    for step in range(16):
        tokens = [real_windows[slot][length + step] for slot, length in enumerate(lengths)]
        at = [length + step for length in lengths]
        rows, expected = half.decode(tokens, at), whole.decode(tokens, at)
        assert rows.dtype == np.float32
        assert float(divergence(log_softmax(expected), log_softmax(rows)).max()) < 1e-3


def test_fidelity_is_what_a_plain_computation_gives(built: Any, tiny_adapter: Path, tiny_base: Path) -> None:
    """Perplexity of the published FP16 version, by transformers on the adapter attached: no code of ours between."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    windows = token_windows(token_ids(evaluation_text(None), tiny_base / "tokenizer.json"), 2048)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(tiny_adapter)).eval()
    tokens = torch.tensor(windows)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=part).logits for part in tokens.split(4)])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 1024), tokens[:, 1:].reshape(-1))
    fp16 = built.results[0]
    assert fp16.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert fp16.perplexity_ratio == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.genai
def test_onnxruntime_genai_gives_the_same_greedy_tokens(support_repository: Path) -> None:
    """Greedy tokens of the INT4 version: the same file, once by genai, once by the engine."""
    genai = pytest.importorskip("onnxruntime_genai")
    from stillhouse.engine.model import LanguageModel
    from stillhouse.engine.options import EngineOptions
    from stillhouse.engine.sampling import SamplingParams

    directory = support_repository / "support-int4" / "1"
    questions = ["What is the capital of France?", "Write one sentence about the sea."]
    with LanguageModel.load(directory, EngineOptions(max_num_seqs=1, max_model_len=512)) as model:
        # genai gives a lone row no company, so ours has none here (see OrtRunner).
        model.engine._runner._lone_row_differs = False  # type: ignore[attr-defined]
        params = SamplingParams(max_tokens=32, temperature=0.0)
        prompts = [model.prompt_ids(messages=[{"role": "user", "content": question}]) for question in questions]
        ours = [list(model.generate(prompt, params).token_ids) for prompt in prompts]
        eos = set(model.version.manifest.network.eos_token_ids)
    theirs = [genai_tokens(genai, directory, prompt, 32) for prompt in prompts]
    for mine, other in zip(ours, theirs, strict=True):
        assert [token for token in mine if token not in eos] == [token for token in other if token not in eos]
        assert len(mine) > 4


@pytest.mark.genai
@pytest.mark.parametrize("model", ["tiny-fp16", "tiny-int8"])
def test_onnxruntime_genai_opens_the_other_precisions(model: str, repository: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    assert len(genai_tokens(genai, repository / model / "1", [5, 6, 7, 8], 4)) == 4


def genai_tokens(genai: Any, directory: Path, prompt: list[int], most: int) -> list[int]:
    """Greedy tokens by onnxruntime-genai, up to `most`."""
    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + most, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.asarray(prompt, np.int32))
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, more) for family, more in FAMILIES.items()},
    "Llama 3.2: tied, its rope": (
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 5e5},
        },
    ),
    "Llama: heads wider than the model, biases": (
        "LlamaForCausalLM",
        {"head_dim": 64, "attention_bias": True, "mlp_bias": True},
    ),
    "Llama: every head its own keys": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "Mistral: heads narrower than the model, tied": (
        "MistralForCausalLM",
        {"sliding_window": None, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "Qwen2: tied, another theta": (
        "Qwen2ForCausalLM",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "Qwen2: rope scaled linearly": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "Qwen3: tied, wide heads, biases": (
        "Qwen3ForCausalLM",
        {"tie_word_embeddings": True, "head_dim": 64, "attention_bias": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_supported_family_is_exported_as_transformers_has_it(
    variant: str, tmp_path: Path, family_checkpoint: Callable[..., Path]
) -> None:
    import torch
    import transformers

    family, more = VARIANTS[variant]
    checkpoint = family_checkpoint(family, tmp_path / "base", **more)
    arguments: dict[str, Any] = {"checkpoint": str(checkpoint), "destination": str(tmp_path / "model")}
    arguments |= {"precision": "fp32", "target": "cpu", "options": {}}
    run_stage("export", arguments, log=tmp_path / "log", share=lambda _: None)
    runner = OrtRunner(tmp_path / "model" / "model.onnx", network=read_network(checkpoint), slots=2, max_len=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, 1024, (2, 60)).tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    assert float(np.abs(runner.prefill(0, tokens[0][:40], 0) - expected[0, :40]).max()) < 1e-4
    runner.prefill(1, tokens[1][:50], 0)
    for step in range(10):
        rows = runner.decode([tokens[0][40 + step], tokens[1][50 + step]], [40 + step, 50 + step])
        assert float(np.abs(rows - expected[[0, 1], [40 + step, 50 + step]]).max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family_is_quantized_as_transformers_has_it(
    family: str, tmp_path: Path, family_checkpoint: Callable[..., Path]
) -> None:
    """8 bits in blocks of 32, head and embedding of their own, two rows decoded at once."""
    import torch
    import transformers

    checkpoint = family_checkpoint(family, tmp_path / "base", **FAMILIES[family])
    arguments: dict[str, Any] = {"checkpoint": str(checkpoint), "destination": str(tmp_path / "fp32")}
    arguments |= {"precision": "fp32", "target": "cpu", "options": {}}
    run_stage("export", arguments, log=tmp_path / "log", share=lambda _: None)
    network = read_network(checkpoint)
    words: dict[str, Any] = {"checkpoint": str(checkpoint), "graph": str(tmp_path / "fp32"), "bits": 8, "method": "rtn"}
    words |= {"destination": str(tmp_path / "int8"), "network": network.model_dump()}
    run_stage("quantize", words, log=tmp_path / "log", share=lambda _: None)
    size = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("int8", "fp32")]
    assert size[0] < 0.45 * size[1]
    runner = OrtRunner(tmp_path / "int8" / "model.onnx", network=network, slots=2, max_len=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, 1024, (2, 60)).tolist()
    with torch.no_grad():
        expected = log_softmax(model(input_ids=torch.tensor(tokens)).logits.reshape(-1, 1024).numpy()).reshape(
            2, 60, -1
        )
    prefilled = log_softmax(runner.prefill(0, tokens[0][:40], 0))
    assert float(divergence(expected[0, :40], prefilled).mean()) < 0.02
    runner.prefill(1, tokens[1][:50], 0)
    for step in range(10):
        rows = log_softmax(runner.decode([tokens[0][40 + step], tokens[1][50 + step]], [40 + step, 50 + step]))
        assert float(divergence(expected[[0, 1], [40 + step, 50 + step]], rows).mean()) < 0.05


def test_a_graph_that_is_another_model_than_the_checkpoint_is_refused(
    graph: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """One that the builder exported without what it does not know: here other positions."""
    refuse_another_model(tiny_base, graph / "model.onnx")
    other = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((other / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(StillhouseError, match=r"the exported graph is another model .* a logit differs by"):
        refuse_another_model(other, graph / "model.onnx")


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("Qwen2ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0}}),
        ("MistralForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
        ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "longrope"}}),
    ],
)
def test_positions_that_the_export_does_not_know_are_refused_by_name(
    family: str, rope: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    (base / "config.json").write_text(
        json.dumps(config | {"architectures": [family], "model_type": family[:-11].lower()} | rope)
    )
    name = next(iter(rope.values())).get("rope_type", "yarn")
    with pytest.raises(StillhouseError, match=f"scales its positions by {name} .* not supported for a {family}"):
        open_checkpoint(str(base))
