"""Batch 1 against the memory's speed: a synthetic 1.5B at INT4, its weights random, its shape a real model's.

The shape is DeepSeek-R1-Distill-Qwen-1.5B's (Qwen2, embedding and head not tied). Decoding a token at batch 1 reads
every weight of every matrix product once, so that tokens/s × those bytes ÷ the streaming read bandwidth is the share
of what the memory allows. Random weights cost what trained ones cost; what the model says means nothing.

    python benchmarks/synthetic.py               # builds it (some 4 GB of disk meanwhile; cached), measures it

The checkpoint is written a layer at a time in bfloat16 and read back mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bandwidth import read_bandwidth_gb_s
from machine import describe
from roster import CACHE, HERE, ROOT, PeerProcess, known
from workload import Workload

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# As in a build of a real model: asymmetric blocks of 32, 8-bit head, int8 activations.
OPTIONS = ("algo_config=k_quant_last", "block_size=32", "accuracy_level=4")


def write_checkpoint(folder: Path, shape: dict[str, Any], seed: int = 0) -> None:
    """A checkpoint of random bfloat16 weights, a shard a layer, so that one layer at a time is in memory."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    kv_width = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]

    def weight(*sizes: int) -> torch.Tensor:
        return (torch.randn(*sizes, generator=generator) * 0.02).to(torch.bfloat16)

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    index: dict[str, str] = {}
    for layer in range(shape["num_hidden_layers"]):
        rows = {"q_proj": hidden, "k_proj": kv_width, "v_proj": kv_width}
        tensors = {f"self_attn.{name}.weight": weight(size, hidden) for name, size in rows.items()}
        tensors |= {f"self_attn.{name}.bias": weight(size) for name, size in rows.items()}
        tensors["self_attn.o_proj.weight"] = weight(hidden, hidden)
        tensors |= {f"mlp.{name}.weight": weight(width, hidden) for name in ("gate_proj", "up_proj")}
        tensors["mlp.down_proj.weight"] = weight(hidden, width)
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        tensors |= {"input_layernorm.weight": ones, "post_attention_layernorm.weight": ones.clone()}
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        shard(f"layer-{layer:02}.safetensors", named)
    shard("embedding.safetensors", {"model.embed_tokens.weight": weight(shape["vocab_size"], hidden)})
    shard("norm.safetensors", {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    if not shape["tie_word_embeddings"]:
        shard("head.safetensors", {"lm_head.weight": weight(shape["vocab_size"], hidden)})
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )


def build(out: Path, tokenizer: Path, shape: dict[str, Any]) -> Path:
    """The INT4 version directory at `out`, made unless it is there; `tokenizer` is a version to borrow one from."""
    if (out / "manifest.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        checkpoint, built = Path(scratch, "checkpoint"), Path(scratch, "built")
        checkpoint.mkdir()
        write_checkpoint(checkpoint, shape)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", built]
        command += ["-p", "int4", "-e", "cpu", "-c", Path(scratch, "cache")]
        options = ["--extra_options", "hf_token=false", *OPTIONS]
        subprocess.run([*command, *options], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, built)
        _write_manifest(built, shape)
        built.rename(out)
    return out


def bytes_a_token(model: Path) -> int:
    """Bytes of the weights that one decode step reads: every constant of a matrix product, each once."""
    import onnx

    graph = onnx.load(str(model), load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    read = {name for node in graph.node if "MatMul" in node.op_type for name in node.input if name in constants}
    return sum(_tensor_bytes(constants[name]) for name in read)


def _tensor_bytes(tensor: Any) -> int:
    where = {entry.key: entry.value for entry in tensor.external_data}
    return int(where["length"]) if where else len(tensor.raw_data)


def _write_manifest(directory: Path, shape: dict[str, Any]) -> None:
    from stillhouse.engine.directory import sha256_of
    from stillhouse.engine.manifest import BaseRecord, FileRecord, Manifest, MemoryRecord, ModelRecord

    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    kv_bytes = 2 * 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim
    files = [
        FileRecord(path=file.name, bytes=file.stat().st_size, sha256=sha256_of(file))
        for file in sorted(directory.iterdir())
    ]
    manifest = Manifest(
        name="synthetic",
        model="synthetic-int4",
        version=1,
        precision="int4",
        target="cpu",
        created=datetime.now(timezone.utc),
        inputs_sha256="0" * 64,
        base=BaseRecord(id="random weights", sha256="0" * 64),
        recipe={"int4": list(OPTIONS)},
        tools={},
        files=files,
        network=ModelRecord(
            architecture="qwen2",
            layers=shape["num_hidden_layers"],
            hidden_size=shape["hidden_size"],
            heads=shape["num_attention_heads"],
            kv_heads=shape["num_key_value_heads"],
            head_dim=head_dim,
            vocab_size=shape["vocab_size"],
            context_length=shape["max_position_embeddings"],
            eos_token_ids=[shape["eos_token_id"]],
        ),
        memory=MemoryRecord(weights_bytes=sum(file.bytes for file in files), kv_bytes_per_token=kv_bytes),
    )
    (directory / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")


def measure(version: Path, tokenizer: Path, *, threads: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Decode at batch 1 and bandwidth, in turns; the medians, and the share of what the memory allows."""
    workload = Workload.of_manual(tokenizer / "tokenizer.json", seed=0)
    read = bytes_a_token(version / "model.onnx")
    rates, bandwidths, peaks, anonymous, loads = [], [], [], [], []
    for number in range(rounds):
        bandwidths.append(read_bandwidth_gb_s(threads))
        load = {"threads": threads, "sequences": 1, "context_tokens": 2048}
        with PeerProcess(known()["stillhouse"], version, timeout_s=900, **load) as process:
            process.ask("decode", prompts=workload.prompts(1, number, "warm"), tokens=4)
            rates.append(process.ask("decode", prompts=workload.prompts(1, number), tokens=tokens)["tokens_per_s"])
            held = process.ask("memory")
            peaks.append(held["peak_rss_bytes"])
            anonymous.append(held["anonymous_bytes"])
            loads.append(process.about["load_s"])
    bandwidth = max(bandwidths)
    return {
        "machine": describe(),
        "threads": threads,
        "rounds": rounds,
        "bytes_a_token": read,
        "bandwidth_gb_s": bandwidth,
        "tokens_per_s": median(rates),
        "share_of_bandwidth": median(rates) * read / (bandwidth * 1e9),
        "peak_rss_bytes": median(peaks),
        "anonymous_bytes": median(anonymous),
        "load_s": median(loads),
        "model_bytes": sum((version / name).stat().st_size for name in ("model.onnx", "model.onnx.data")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model_repository/support-int4/1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results/synthetic.json")
    args = parser.parse_args()
    version = CACHE / f"synthetic/int4-{args.layers}-layers"
    build(version, args.tokenizer, SHAPE | {"num_hidden_layers": args.layers})
    report = measure(version, args.tokenizer, threads=args.threads, tokens=args.tokens, rounds=args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"{report['tokens_per_s']:.1f} tokens/s at batch 1, {report['bytes_a_token'] / 1e6:.0f} MB of weights a token: "
        f"{report['share_of_bandwidth']:.0%} of {report['bandwidth_gb_s']:.1f} GB/s; "
        f"peak RSS {report['peak_rss_bytes'] / 1e6:.0f} MB, of which anonymous {report['anonymous_bytes'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
