"""The most memory that each stage of a build holds, on a checkpoint of a real model's shape with random weights.

    python benchmarks/memory.py                      # DeepSeek-R1-Distill-Qwen-1.5B's shape, all three precisions
    python benchmarks/memory.py --layers 2           # to try it out

It writes the base (bfloat16), a LoRA adapter on all linear modules and a recipe into a temporary folder (some 40 GB at
the full shape), builds it with an empty cache, and prints the resident set's peak of every stage's process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from roster import ROOT
from synthetic import SHAPE, TOKENIZER_FILES, write_checkpoint

LIMIT_BYTES = 12 * 2**30


def write_recipe(folder: Path, tokenizer: Path, shape: dict[str, Any], precisions: list[str]) -> Path:
    """A base, an adapter and a recipe that asks for `precisions`, with gates that random weights hold."""
    base, adapter = folder / "base", folder / "adapter"
    for place in (base, adapter):
        place.mkdir(parents=True)
    write_checkpoint(base, shape)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, base)
    write_adapter(adapter, shape)
    gates = "".join(f"[gate.{precision}]\nperplexity_ratio = 1000.0\n" for precision in precisions)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'name = "synthetic"\nbase = "base"\nadapters = ["adapter"]\nprecisions = {json.dumps(precisions)}\n{gates}',
        encoding="utf-8",
    )
    return recipe


def write_adapter(folder: Path, shape: dict[str, Any], rank: int = 16) -> None:
    """A random LoRA on every linear module of every layer, in peft's format."""
    import torch
    from safetensors.torch import save_file

    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    kv_width = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    modules = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    modules |= {f"self_attn.{name}_proj": (kv_width, hidden) for name in "kv"}
    modules |= {f"mlp.{name}_proj": (width, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, width)}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, (rows, columns) in modules.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in modules}), "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "examples/smollm2/base", help="a folder to borrow from"
    )
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--precisions", default="fp16,int8,int4")
    parser.add_argument(
        "--folder", type=Path, help="where to work, kept afterwards; a second run finds the stages cached"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-memory-") as temporary:
        folder = args.folder or Path(temporary)
        recipe = folder / "recipe.toml"
        if not recipe.is_file():
            shape = SHAPE | {"num_hidden_layers": args.layers}
            write_recipe(folder, args.tokenizer, shape, args.precisions.split(","))
        command = [sys.executable, "-m", "stillhouse.cli.main", "build", str(recipe), "--json"]
        command += ["--repository", str(folder / "repository")]
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "STILLHOUSE_CACHE_BYTES": str(10**12)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
        stages = json.loads(done.stdout)["stages"] if done.stdout else []
    for stage in stages:
        note = "reused" if stage["reused"] else f"{stage['peak_rss_bytes'] / 2**30:6.2f} GiB  {stage['seconds']:7.1f} s"
        print(f"{stage['name']:16} {note}")
    most = max((stage["peak_rss_bytes"] for stage in stages), default=0)
    print(f"{'most':16} {most / 2**30:6.2f} GiB of {LIMIT_BYTES / 2**30:.0f}")
    return done.returncode or int(most > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
