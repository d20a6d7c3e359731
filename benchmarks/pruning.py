"""What pruning does to the example's model: a third of its heads, or some of its layers, before and after healing.

SmolLM2-135M with the example's adapter (`python examples/smollm2/prepare.py` first). Each way is `stillhouse prune` by
itself, with a recipe of its own; the figures are those of its prune.json. Healing is short: it says what minutes on a
CPU give back, not what an afternoon on a GPU would.

    python benchmarks/pruning.py --write-docs     # some 10 minutes on 2 cores
    python benchmarks/pruning.py heads            # one way alone; the other stays as it was measured
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from figures import publish
from machine import describe
from roster import HERE, ROOT

DOCS, BEGIN, END = ROOT / "docs/tune.md", "<!-- pruning: begin -->", "<!-- pruning: end -->"
EXAMPLE = ROOT / "examples/support"
WAYS = {"heads": "heads = 0.2\nlayers = 0", "layers": "heads = 0.0\nlayers = 3"}
HEALING = {"records.jsonl": 32, "general.jsonl": 16}  # so many records of each file
RECIPE = """
name = "support"
base = "{base}"
adapters = ["{example}/adapter"]

[tune]
train = "train.jsonl"
targets = "all-linear"
learning_rate = 5e-4
patience = 0
seed = 17

[evaluate]
records = "heldout.jsonl"
general = "{example}/general_heldout.jsonl"

[prune]
{way}
examples = 24
"""
ROWS = (
    ("weights, MB", "bytes", 1e-6, 0),
    ("KV cache, KB a token (FP32)", "kv_bytes_per_token", 1e-3, 1),
    ("prefill, tokens/s (torch), of the whole's", "prefill_tokens_per_s", 1.0, 2),
    ("decode, tokens/s (torch), of the whole's", "decode_tokens_per_s", 1.0, 2),
    ("perplexity of the shop's held-out answers", "records_perplexity", 1.0, 2),
    ("perplexity of general answers", "general_perplexity", 1.0, 2),
    ("perplexity of general text", "text_perplexity", 1.0, 2),
)

TIMED = ("prefill_tokens_per_s", "decode_tokens_per_s")  # in rounds by turns with the whole model of the same way


def measure(way: str, base: Path, heldout: int) -> dict[str, Any]:
    """The report of `stillhouse prune` in one way, and how far the pruned checkpoint is from the masked model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = [line for name, count in HEALING.items() for line in _lines(EXAMPLE / name)[:count]]
        (folder / "train.jsonl").write_text("\n".join(train) + "\n", "utf-8")
        (folder / "heldout.jsonl").write_text("\n".join(_lines(EXAMPLE / "heldout.jsonl")[:heldout]) + "\n", "utf-8")
        recipe = folder / "recipe.toml"
        recipe.write_text(RECIPE.format(base=base, example=EXAMPLE, way=WAYS[way]), "utf-8")
        command = [sys.executable, "-m", "stillhouse.cli.main", "prune", str(recipe), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report: dict[str, Any] = json.loads(done.stdout)
        return report | {"largest_logit_difference": masked_against_cut(report["cut"], base, folder / "cut")}


def masked_against_cut(cut: dict[str, Any], base: Path, folder: Path) -> float:
    """The base cut as `cut` says, loaded by transformers, against the whole base whose other heads and layers are
    silent: the largest difference of their logits over a held-out text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stillhouse.tune.surgery import Kept, cut_out

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    size = model.config.num_attention_heads // model.config.num_key_value_heads
    kept = [Kept(int(at), sorted({one // size for one in heads}), heads) for at, heads in cut["kept_heads"].items()]
    cut_out(model, kept).save_pretrained(folder)
    text = json.loads(_lines(EXAMPLE / "heldout.jsonl")[0])["output"]
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
    smaller = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def silencing(mask: Any) -> Any:
        return lambda _, inputs: (inputs[0] * mask,)

    places, width = {layer.layer: layer.heads for layer in kept}, model.config.head_dim
    for at, layer in enumerate(model.model.layers):
        if at not in places:
            layer.forward = lambda hidden_states, *_, **__: hidden_states
            continue
        mask = torch.zeros(model.config.num_attention_heads, width)
        mask[places[at]] = 1
        layer.self_attn.o_proj.register_forward_pre_hook(silencing(mask.flatten()))
    with torch.no_grad():
        return float((smaller(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max())


def _lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()


def markdown(report: dict[str, Any]) -> str:
    one = next(iter(report["ways"].values()))["models"][0]
    columns = [("whole", one, one)]
    for way in report["ways"].values():
        cut = way["cut"]
        gone = (
            [f"{len(cut['layers'])} of {len(cut['layers']) + len(cut['kept_heads'])} layers"] if cut["layers"] else []
        )
        gone += [f"{100 * cut['heads_share']:.0f}% of the heads"] if cut["heads_share"] else []
        whole, pruned, healed = way["models"]
        columns += [(f"without {' and '.join(gone)}", pruned, whole), ("the same, healed", healed, whole)]
    lines = [f"| | {' | '.join(name for name, _, _ in columns)} |", "|---|" + "--:|" * len(columns)]
    for title, key, scale, digits in ROWS:
        figures = (_figure(model, key) / (_figure(whole, key) if key in TIMED else 1.0) for _, model, whole in columns)
        cells = (f"{figure * scale:,.{digits}f}" for figure in figures)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines.append("")
    for name, way in report["ways"].items():
        apart = f"{way['largest_logit_difference']:.1g}"
        lines.append(f"- {name}: {way['verdict']}. The cut base, loaded by transformers, has the whole one's logits "
                     f"with the same parts silent, within {apart}.")  # fmt: skip
    machine, healing = report["machine"], " and ".join(f"{count} of {name}" for name, count in HEALING.items())
    lines += ["", f"Healed for one epoch on {healing}; the pruned model has the healed one's shape, and so its speed. "
              f"Machine: {machine['processor']}, {machine['cores']} cores. Measured {report['measured']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _figure(model: dict[str, Any], key: str) -> float:
    return float(model["costs"][key] if key in model["costs"] else model[key]["value"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", choices=[[], *WAYS], help="which to measure; the others stay as they were")
    parser.add_argument("--base", type=Path, default=ROOT / "examples/smollm2/base")
    parser.add_argument("--heldout", type=int, default=12, help="so many held-out records")
    parser.add_argument("--out", type=Path, default=HERE / "results/pruning.json")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/tune.md")
    args = parser.parse_args()
    before = json.loads(args.out.read_text("utf-8"))["ways"] if args.ways and args.out.is_file() else {}
    now = {way: measure(way, args.base.resolve(), args.heldout) for way in args.ways or WAYS}
    ways = {way: found for way in WAYS if (found := now.get(way, before.get(way))) is not None}
    measured = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    report = {"measured": measured, "machine": describe(), "ways": ways}
    publish(report, markdown(report), args.out, [DOCS] if args.write_docs else [], BEGIN, END)


if __name__ == "__main__":
    main()
