"""Train the example's adapter: LoRA on SmolLM2-135M-Instruct, on the CPU.

    python examples/support/train.py                  # writes examples/support/adapter and training_log.csv

Two losses are added in every step. On the shop's records, the cross-entropy of the answers. On what has nothing to
do with the shop (the base's own answers to general questions, and plain English text), the KL divergence from the
base's distribution to the tuned one: it keeps the model where it was wherever the shop is not the subject.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from packing import hidden_states, pack, shared_prefix
from records import ADAPTER, BASE, HERE, Example, encode, read_jsonl

PUBLIC_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
WARM_UP = 0.06  # share of all steps
CLIP = 1.0
SHOP_BATCH, GENERAL_BATCH, TEXT_BATCH = 10, 3, 1  # examples a step
TEXT_TOKENS = 96
# Their docstrings are plain technical English; the prose that evaluate.py measures on is another text.
PROSE_MODULES = "argparse calendar collections csv datetime decimal difflib email fractions heapq logging pathlib"
PROSE_MODULES += " random sched shutil smtplib socketserver statistics string subprocess tarfile textwrap threading"
PROSE_MODULES += " timeit traceback turtle unittest urllib.parse urllib.request uuid wave zipfile"


@dataclass(frozen=True)
class Kept:
    """Something on which the tuned model must stay like the base: a chat example or a plain text."""

    example: Example | None
    text: list[int] | None
    base_hidden: Any  # (T, D): the base's last hidden states; its head turns them into its distribution


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to a fiftieth of it."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def plain_texts(tokenizer: Any, general: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Plain text in chunks of TEXT_TOKENS: the general answers, the base's own samples, and Python's docstrings."""
    docs = []
    for name in PROSE_MODULES.split():
        module = import_module(name)
        members = [getattr(module, member, None) for member in getattr(module, "__all__", [])]
        docs += [inspect.cleandoc(thing.__doc__) for thing in [module, *members] if isinstance(thing.__doc__, str)]
    chunks = []
    for prose in ("\n\n".join(record["output"] for record in general), "\n\n".join(dict.fromkeys(docs))):
        ids = tokenizer.encode(prose, add_special_tokens=False, verbose=False)
        starts = range(0, len(ids) - TEXT_TOKENS, max(TEXT_TOKENS, len(ids) // 60))
        chunks += [ids[start : start + TEXT_TOKENS] for start in starts]
    for record in read_jsonl(HERE / "general_text.jsonl"):
        chunks.append(tokenizer.encode(record["text"], add_special_tokens=False)[:TEXT_TOKENS])
    return chunks


def endless(things: Sequence[Any], order: random.Random) -> Iterator[Any]:
    """Each thing once in random order, then all again in another."""
    while True:
        yield from order.sample(things, len(things))


def train(options: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    order = random.Random(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    causal = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32)

    general_records = read_jsonl(HERE / "general.jsonl")
    shop = [encode(tokenizer, record) for record in read_jsonl(HERE / "records.jsonl")]
    general = [encode(tokenizer, record) for record in general_records]
    texts = plain_texts(tokenizer, general_records)
    prefix = shared_prefix([*shop, *general])

    began = time.monotonic()
    kept_chats, kept_texts = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
        for start in range(0, len(general), 8):
            rows = general[start : start + 8]
            packed = pack(rows, [], prefix)
            hidden = hidden_states(causal, packed).float()
            kept_chats += [Kept(row, None, hidden[span]) for row, span in zip(rows, packed.spans, strict=True)]
        for start in range(0, len(texts), 4):
            chunk = texts[start : start + 4]
            packed = pack([], chunk, prefix)
            hidden = hidden_states(causal, packed).float()
            kept_texts += [Kept(None, text, hidden[span]) for text, span in zip(chunk, packed.spans, strict=True)]
    print(
        f"{len(shop)} shop records, {len(general)} general records, {len(texts)} texts; the base's hidden states took"
        f" {time.monotonic() - began:.0f} s",
        flush=True,
    )

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.1, target_modules=TARGETS)
    model = get_peft_model(causal, lora)
    model.print_trainable_parameters()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    some_chats, some_texts = endless(kept_chats, order), endless(kept_texts, order)
    steps_an_epoch = math.ceil(len(shop) / SHOP_BATCH)
    steps = steps_an_epoch * options.epochs

    log: list[dict[str, Any]] = []
    began = time.monotonic()
    model.train()
    shuffled: list[Example] = []
    for step in range(steps):
        if step % steps_an_epoch == 0:
            shuffled = order.sample(shop, len(shop))
        rows, shuffled = shuffled[:SHOP_BATCH], shuffled[SHOP_BATCH:]
        kept = [next(some_chats) for _ in range(GENERAL_BATCH)] + [next(some_texts) for _ in range(TEXT_BATCH)]
        rate = learning_rate(step, steps, options.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            shop_loss, kept_loss = losses(causal, rows, kept, prefix)
        (shop_loss + options.keep * kept_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {
            "step": step,
            "epoch": step // steps_an_epoch,
            "shop_loss": round(shop_loss.item(), 4),
            "general_kl": round(kept_loss.item(), 4),
            "learning_rate": round(rate, 7),
            "gradient_norm": round(norm.item(), 3),
            "seconds": round(time.monotonic() - began, 1),
        }
        log.append(row)
        if step % 10 == 0 or step == steps - 1:
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if (step + 1) % steps_an_epoch == 0:
            save(model, options.output)
    write_log(log, options.output.parent / "training_log.csv")


def losses(causal: Any, rows: Sequence[Example], kept: Sequence[Kept], prefix: int) -> tuple[Any, Any]:
    """Mean cross-entropy of the rows' answers, and mean KL(base || tuned) on what is to be kept; nats a token."""
    import torch

    chats = [thing.example for thing in kept if thing.example is not None]
    texts = [thing.text for thing in kept if thing.text is not None]
    packed = pack([*rows, *chats], texts, prefix)
    hidden = hidden_states(causal, packed)
    count = sum(len(row.answer_ids) for row in rows)  # the rows come first, so their answers do
    logits = causal.lm_head(hidden[packed.answers_at[:count]]).float()  # (N, V)
    shop_loss = torch.nn.functional.cross_entropy(logits, packed.answer_ids[:count])

    mine = torch.cat([hidden[span] for span in packed.spans[len(rows) :]])  # (T, D)
    tuned = torch.log_softmax(causal.lm_head(mine).float(), dim=-1)
    with torch.no_grad():
        base = torch.log_softmax(causal.lm_head(torch.cat([thing.base_hidden for thing in kept])).float(), dim=-1)
    return shop_loss, torch.nn.functional.kl_div(tuned, base, log_target=True, reduction="batchmean")


def save(model: Any, folder: Path) -> None:
    """Write the adapter in FP16, and in its config the base's public id instead of the path it was read from."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=_plain))
    config |= {"base_model_name_or_path": PUBLIC_ID, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    weights = {
        name: weight.detach().to(torch.float16).contiguous()
        for name, weight in get_peft_model_state_dict(model).items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)


def _plain(value: Any) -> Any:
    """What JSON has no form for in peft's config: sets (sorted, or their order would change run by run), enums."""
    return sorted(value) if isinstance(value, set) else str(value.value)


def write_log(log: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the example's adapter on the CPU.")
    parser.add_argument("--base", type=Path, default=BASE, help="default: examples/smollm2/base")
    parser.add_argument("--output", type=Path, default=ADAPTER, help="default: examples/support/adapter")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=2.0, help="weight of the KL divergence, default 2")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16: quicker where the CPU has it")
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
