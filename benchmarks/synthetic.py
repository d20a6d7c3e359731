"""Batch 1 against the memory's speed: a synthetic 1.5B at INT4, its weights random, its shape a real model's.

The shape is DeepSeek-R1-Distill-Qwen-1.5B's (Qwen2, embedding and head not tied). Decoding a token at batch 1 reads
every weight of every matrix product once, so that tokens/s × those bytes ÷ the streaming read bandwidth is the share
of what the memory allows. Random weights cost what trained ones cost; what the model says means nothing.

    python benchmarks/synthetic.py               # builds it (some 4 GB of disk meanwhile; cached), measures it

Two layers are built from a random checkpoint; the second is repeated to the depth asked for, each copy with bytes of
its own. What a build of a real 1.5B needs is another question: docs/build.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from figures import publish, two_columns
from machine import describe
from roster import CACHE, HERE, ROOT, PeerProcess, known
from workload import Workload

DOCS, BEGIN, END = ROOT / "docs/benchmarks.md", "<!-- synthetic: begin -->", "<!-- synthetic: end -->"
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
BUILT_LAYERS = 2
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
        write_checkpoint(checkpoint, shape | {"num_hidden_layers": BUILT_LAYERS})
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", built]
        command += ["-p", "int4", "-e", "cpu", "-c", Path(scratch, "cache")]
        options = ["--extra_options", "hf_token=false", *OPTIONS]
        subprocess.run([*command, *options], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
        repeat_last_layer(built, shape["num_hidden_layers"])
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, built)
        write_manifest(built, shape)
        built.rename(out)
    return out


def repeat_last_layer(built: Path, layers: int) -> None:
    """Makes a graph of two layers one of `layers`: copies of the second, with weights of their own, in its place."""
    import onnx

    model = onnx.load(str(built / "model.onnx"), load_external_data=False)
    graph, data = model.graph, built / "model.onnx.data"

    def renamed(name: str, layer: int) -> str:
        """A name of layer 1, or of layer 0 before it, as layer `layer` or the one before that has it."""
        name = re.sub(r"(layers|past_key_values|present)\.1(?=[./])", rf"\1.@{layer}", name)
        return re.sub(r"layers\.0(?=[./])", f"layers.{layer - 1}", name).replace("@", "")

    def repeated(entry: Any, layer: int) -> Any:
        copy = type(entry)()
        copy.CopyFrom(entry)
        copy.name = renamed(entry.name, layer)
        return copy

    last = re.compile(r"(layers|past_key_values|present)\.1[./]")
    for node in graph.node:
        if last.search(node.name) is None:  # what comes after the layers reads the last of them
            node.input[:] = [renamed(name, layers - 1) if last.search(name) else name for name in node.input]
            node.name = node.name.replace(f"layers.{BUILT_LAYERS}/", f"layers.{layers}/")
            node.output[:] = [name.replace(f"layers.{BUILT_LAYERS}/", f"layers.{layers}/") for name in node.output]
            node.input[:] = [name.replace(f"layers.{BUILT_LAYERS}/", f"layers.{layers}/") for name in node.input]
    del graph.value_info[:]
    nodes = [node for node in graph.node if last.search(node.name)]
    tail = list(graph.node)[list(graph.node).index(nodes[-1]) + 1 :]
    del graph.node[len(graph.node) - len(tail) :]
    weights = [tensor for tensor in graph.initializer if last.search(tensor.name)]
    with data.open("r+b") as file:
        for layer in range(BUILT_LAYERS, layers):
            for node in nodes:
                copy = repeated(node, layer)
                copy.input[:] = [renamed(name, layer) for name in node.input]
                copy.output[:] = [renamed(name, layer) for name in node.output]
                graph.node.append(copy)
            for tensor in weights:
                graph.initializer.append(_with_own_bytes(repeated(tensor, layer), file))
            for values in (graph.input, graph.output):
                values.extend([repeated(value, layer) for value in values if last.search(value.name)])
    graph.node.extend(tail)
    onnx.save(model, str(built / "model.onnx"))


def _with_own_bytes(tensor: Any, file: Any) -> Any:
    """`tensor`, its external data copied to the end of `file`."""
    where = {entry.key: entry for entry in tensor.external_data}
    if where:
        file.seek(int(where["offset"].value))
        content = file.read(int(where["length"].value))
        file.seek(0, os.SEEK_END)
        file.write(b"\0" * (-file.tell() % 4096))
        where["offset"].value = str(file.tell())
        file.write(content)
    return tensor


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


def write_manifest(directory: Path, shape: dict[str, Any]) -> None:
    """Makes a folder of such a model a version directory."""
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
        bandwidths.append(read_bandwidth_gb_s(threads))
    bandwidth = max(bandwidths)
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
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


def markdown(report: dict[str, Any]) -> str:
    rows = [
        ("decode, 1 sequence", f"{report['tokens_per_s']:.1f} tokens/s"),
        ("weights that a token reads", f"{report['bytes_a_token'] / 1e6:,.0f} MB"),
        ("streaming read of this memory", f"{report['bandwidth_gb_s']:.1f} GB/s"),
        ("share of it that decoding uses", f"{report['share_of_bandwidth']:.0%}"),
        ("peak RSS", f"{report['peak_rss_bytes'] / 1e6:,.0f} MB"),
        ("of which no file backs (at the end)", f"{report['anonymous_bytes'] / 1e6:,.0f} MB"),
        ("load", f"{report['load_s']:.2f} s"),
        ("files", f"{report['model_bytes'] / 1e6:,.0f} MB"),
    ]
    return two_columns(rows, report, f"medians of {report['rounds']} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "model_repository/support-int4/1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: to try it out")
    parser.add_argument("--out", type=Path, default=HERE / "results/synthetic.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    args = parser.parse_args()
    version = CACHE / f"synthetic/int4-{args.layers}-layers"
    build(version, args.tokenizer, SHAPE | {"num_hidden_layers": args.layers})
    report = measure(version, args.tokenizer, threads=args.threads, tokens=args.tokens, rounds=args.rounds)
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
