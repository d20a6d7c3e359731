"""Train the example's adapter: LoRA on SmolLM2-135M-Instruct, on the CPU, the loss on the answers alone.

    python examples/support/train.py                  # writes examples/support/adapter and training_log.csv

Every epoch sees all records of the shop, and as many general records as `--general` says, drawn anew: they are the
base model's own answers, and keep it where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

from records import ADAPTER, BASE, HERE, Example, answer_losses, batches, encode, read_jsonl, to_tensors

PUBLIC_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
WARM_UP = 0.08  # share of all steps
CLIP = 1.0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a twentieth of it."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(options: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    order = random.Random(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=TARGETS,
            base_model_name_or_path=PUBLIC_ID,
        ),
    )
    model.print_trainable_parameters()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))

    shop = [encode(tokenizer, record) for record in read_jsonl(HERE / "records.jsonl")]
    general = [encode(tokenizer, record) for record in read_jsonl(HERE / "general.jsonl")]
    plan: list[tuple[int, list[Example]]] = []
    for epoch in range(options.epochs):
        mixed = shop + order.sample(general, min(options.general, len(general)))
        plan += [(epoch, batch) for batch in batches(mixed, options.batch_size, order)]

    log: list[dict[str, Any]] = []
    began = time.monotonic()
    model.train()
    for step, (epoch, batch) in enumerate(plan):
        rate = learning_rate(step, len(plan), options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, mask, labels = to_tensors(batch, tokenizer.pad_token_id)
        loss = answer_losses(model, ids, mask, labels).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {
            "step": step,
            "epoch": epoch,
            "loss": round(loss.item(), 4),
            "learning_rate": round(rate, 7),
            "gradient_norm": round(norm.item(), 3),
            "seconds": round(time.monotonic() - began, 1),
        }
        log.append(row)
        if step % 10 == 0 or step == len(plan) - 1:
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    save(model, options.output)
    with (options.output.parent / "training_log.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def save(model: Any, folder: Path) -> None:
    """Write the adapter as peft does, but with the base's public id instead of the path it was read from."""
    model.save_pretrained(folder)
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = PUBLIC_ID
    config["target_modules"] = sorted(config["target_modules"])  # a set in peft: its order changes run by run
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; ours is one folder up


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the example's adapter on the CPU.")
    parser.add_argument("--base", type=Path, default=BASE, help="default: examples/smollm2/base")
    parser.add_argument("--output", type=Path, default=ADAPTER, help="default: examples/support/adapter")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--general", type=int, default=120, help="general records an epoch")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=17)
    options = parser.parse_args()
    if not (options.base / "config.json").is_file():
        print(f"error: no base model in {options.base}", file=sys.stderr)
        print("hint: python examples/smollm2/prepare.py", file=sys.stderr)
        return 1
    train(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
