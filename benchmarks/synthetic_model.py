"""A version with a real model's shape and random weights: what it costs is what trained weights cost.

The shape is DeepSeek-R1-Distill-Qwen-1.5B's (Qwen2, embedding and head not tied). Two layers of a random checkpoint go
through the stages of `stillhouse build`; the second is repeated to the depth asked for, each copy with its rows in an
order of its own. What a build of a real 1.5B needs is another question: docs/build.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from roster import CACHE

from stillhouse.build.quantize import method_of, stage_options
from stillhouse.build.recipe import QuantizeOptions
from stillhouse.build.verify import read_network
from stillhouse.build.worker import run_stage

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
# A method of `stillhouse build` that needs no calibration; all of them leave the same form: asymmetric blocks with
# half-precision scales, head and embedding at 8 bits, int8 activations. (Its "auto" leaves some layers at 8 bits, too.)
METHOD = "rtn"
BUILT_LAYERS = 2


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


def version_of(layers: int, tokenizer: Path, block_size: int = 32) -> Path:
    """The INT4 version of `layers` layers, made unless it is there; `tokenizer` is a version to borrow one from."""
    out = CACHE / f"synthetic/{METHOD}-int4-block-{block_size}-{layers}-layers"
    shape = SHAPE | {"num_hidden_layers": layers}
    if (out / "manifest.json").is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        checkpoint, graph, built = (Path(scratch, name) for name in ("checkpoint", "fp32", "built"))
        checkpoint.mkdir()
        write_checkpoint(checkpoint, shape | {"num_hidden_layers": BUILT_LAYERS})
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, checkpoint)
        export = {"checkpoint": checkpoint, "destination": graph, "precision": "fp32", "target": "cpu"}
        _run("export", export | {"options": {}})
        network = read_network(checkpoint).model_dump()
        quantize = {"checkpoint": checkpoint, "graph": graph, "destination": built, "network": network}
        options = QuantizeOptions.model_validate({"method": METHOD, "block_size": block_size})
        _run("quantize", quantize | stage_options(method_of("int4", options, "cpu"), options))
        repeat_last_layer(built, layers)
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, built)
        write_manifest(built, shape)
        built.rename(out)
    return out


def _run(stage: str, arguments: dict[str, Any]) -> None:
    """A stage of a build, its log beside what it makes."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()}
    log = Path(plain["destination"]).with_suffix(".log")
    run_stage(stage, plain, log=log, share=lambda _: None)


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
                graph.initializer.append(_with_own_bytes(repeated(tensor, layer), layer, file))
            for values in (graph.input, graph.output):
                values.extend([repeated(value, layer) for value in values if last.search(value.name)])
    graph.node.extend(tail)
    onnx.save(model, str(built / "model.onnx"))


def _with_own_bytes(tensor: Any, layer: int, file: Any) -> Any:
    """`tensor` with its external data copied to the end of `file`, its rows in another order for each layer.

    ONNX Runtime packs weights that are alike once: copies as they are would be read from the cache, not from memory.
    """
    where = {entry.key: entry for entry in tensor.external_data}
    if where:
        file.seek(int(where["offset"].value))
        content = file.read(int(where["length"].value))
        cut = len(content) // tensor.dims[0] * layer
        file.seek(0, os.SEEK_END)
        file.write(b"\0" * (-file.tell() % 4096))
        where["offset"].value = str(file.tell())
        file.write(content[cut:] + content[:cut])
    return tensor


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
        recipe={"int4": {"method": METHOD}},
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
