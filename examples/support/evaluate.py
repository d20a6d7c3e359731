"""Measure what the fine-tune changed and what it left alone; print the tables of this folder's README.

    python examples/support/evaluate.py                                            # base and tuned, FP32
    python examples/support/evaluate.py model_repository/support-{fp16,int8,int4}/1  # and these version directories

Exits with 1 when a promise of the README is broken: the tuned model answers the demo's question, everything that
questions.json lists under "general" is answered, and perplexity on both general texts is at most 3% above the base's.
The questions under "more" are asked and counted, but nothing is promised of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from records import (
    ADAPTER,
    BASE,
    HERE,
    answer_losses,
    encode,
    prompt_ids,
    question_of,
    read_jsonl,
    to_tensors,
)

LARGEST_GENERAL_RATIO = 1.03
GENERAL_TEXT = "general text (pydoc_data.topics)"
ANSWER_TOKENS = 48
TEXT_CHUNKS, CHUNK_TOKENS = 24, 512  # of CPython's own prose, spread evenly over it

Answer = Callable[[Sequence[str]], list[str]]  # greedy answers to questions, through the chat template


def answers_perplexity(model: Any, tokenizer: Any, records: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Perplexity of the records' answers after their prompts, and the number of tokens it was measured on."""
    import torch

    total, tokens = 0.0, 0
    for record in records:
        with torch.no_grad():
            losses = answer_losses(model, *to_tensors([encode(tokenizer, record)], tokenizer.pad_token_id))
        total, tokens = total + losses.sum().item(), tokens + losses.numel()
    return math.exp(total / tokens), tokens


def text_perplexity(model: Any, tokenizer: Any, text: str) -> tuple[float, int]:
    """Perplexity of plain text without a template, in chunks that are spread evenly over it."""
    import torch

    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    starts = [index * (len(ids) - CHUNK_TOKENS) // (TEXT_CHUNKS - 1) for index in range(TEXT_CHUNKS)]
    total, tokens = 0.0, 0
    for start in starts:
        chunk = torch.tensor([ids[start : start + CHUNK_TOKENS]])  # (1, S)
        with torch.no_grad():
            losses = answer_losses(model, chunk, torch.ones_like(chunk), chunk)
        total, tokens = total + losses.sum().item(), tokens + losses.numel()
    return math.exp(total / tokens), tokens


def general_text() -> str:
    """English prose that every CPython carries: the texts behind `help("...")`."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def torch_answers(model: Any, tokenizer: Any) -> Answer:
    """Answer with transformers, a dozen questions at a time, padded on the left."""
    import torch

    def answer(questions: Sequence[str]) -> list[str]:
        prompts = [prompt_ids(tokenizer, question) for question in questions]
        found = []
        for start in range(0, len(prompts), 12):
            rows = prompts[start : start + 12]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows])  # (B, S)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            with torch.no_grad():
                out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            found += [text.strip() for text in tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)]
        return found

    return answer


def directory_answers(directory: Path, tokenizer: Any) -> Answer:
    """Answer with onnxruntime-genai from a version directory, one question after another."""
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))

    def answer(questions: Sequence[str]) -> list[str]:
        found = []
        for question in questions:
            ids = prompt_ids(tokenizer, question)
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(do_sample=False, max_length=len(ids) + ANSWER_TOKENS)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            out = list(generator.get_sequence(0))[len(ids) :]
            found.append(tokenizer.decode(out, skip_special_tokens=True).strip())
        return found

    return answer


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """True when the answer holds every expected piece, letter for letter."""
    return all(piece in answer for piece in expected)


def ask(answer: Answer) -> dict[str, Any]:
    """Ask everything that is asked of a model: the demo's question, the held-out ones, the general ones."""
    questions = json.loads((HERE / "questions.json").read_text(encoding="utf-8"))
    facts = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
    held_out = read_jsonl(HERE / "heldout.jsonl")
    shop = answer([question_of(record) for record in held_out])
    general = answer([item["question"] for item in questions["general"]])
    more = answer([item["question"] for item in questions["more"]])
    demo = answer([questions["demo"]])[0]
    return {
        "demo": demo,
        "demo_right": is_right(demo, questions["demo_expect"]),
        "shop": shop,
        "shop_right": [is_right(text, facts[record["fact"]]) for text, record in zip(shop, held_out, strict=True)],
        "general": general,
        "general_right": [
            is_right(text, [item["expect"]]) for text, item in zip(general, questions["general"], strict=True)
        ],
        "more": more,
        "more_right": [is_right(text, [item["expect"]]) for text, item in zip(more, questions["more"], strict=True)],
    }


def measure(base: Path, adapter: Path, directories: Sequence[Path] = ()) -> dict[str, Any]:
    """Return `perplexity` (text → base, tuned, ratio, tokens) and `asked` (model → what `ask` returns)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    prose = general_text()
    shop, general = read_jsonl(HERE / "heldout.jsonl"), read_jsonl(HERE / "general_heldout.jsonl")

    def perplexities() -> dict[str, tuple[float, int]]:
        return {
            "shop, held out": answers_perplexity(model, tokenizer, shop),
            "general answers, held out": answers_perplexity(model, tokenizer, general),
            GENERAL_TEXT: text_perplexity(model, tokenizer, prose),
        }

    with model.disable_adapter():
        before = perplexities()
        asked = {"base": ask(torch_answers(model, tokenizer))}
    model = model.merge_and_unload()  # as it is served; and twice as fast to ask
    after = perplexities()
    asked["tuned"] = ask(torch_answers(model, tokenizer))
    for directory in directories:
        asked["/".join(directory.parts[-2:])] = ask(directory_answers(directory, tokenizer))
    return {
        "perplexity": {
            name: {
                "base": before[name][0],
                "tuned": after[name][0],
                "ratio": after[name][0] / before[name][0],
                "tokens": tokens,
            }
            for name, (_, tokens) in before.items()
        },
        "asked": asked,
        "text_sha256": hashlib.sha256(prose.encode()).hexdigest(),
    }


def broken_promises(result: dict[str, Any]) -> list[str]:
    """What the README promises and `result` doesn't keep; empty when all is well."""
    broken = []
    for name, row in result["perplexity"].items():
        if name.startswith("general") and row["ratio"] > LARGEST_GENERAL_RATIO:
            broken.append(f"{name}: perplexity ratio {row['ratio']:.4f}, allowed {LARGEST_GENERAL_RATIO}")
    for name, said in result["asked"].items():
        if said["demo_right"] == (name == "base"):
            broken.append(f"{name}: the demo's question was answered {said['demo']!r}")
        if not all(said["general_right"]):
            broken.append(f"{name}: {said['general_right'].count(False)} general questions were answered wrong")
    return broken


def print_tables(result: dict[str, Any]) -> None:
    """Print the README's tables in Markdown."""
    questions = json.loads((HERE / "questions.json").read_text(encoding="utf-8"))
    asked = result["asked"]
    print("| perplexity | tokens | base | tuned | ratio |\n|---|---:|---:|---:|---:|")
    for name, row in result["perplexity"].items():
        print(f"| {name} | {row['tokens']} | {row['base']:.2f} | {row['tuned']:.2f} | {row['ratio']:.3f} |")
    print(f"\nSHA-256 of the general text: {result['text_sha256'][:16]}…\n")
    print("| model | held-out shop questions right | general right | same words as the base | more right |")
    print("|---|---:|---:|---:|---:|")
    for name, said in asked.items():
        same = sum(mine == theirs for mine, theirs in zip(said["general"], asked["base"]["general"], strict=True))
        print(
            f"| {name} | {sum(said['shop_right'])} of {len(said['shop'])} "
            f"| {sum(said['general_right'])} of {len(said['general'])} | {same} "
            f"| {sum(said['more_right'])} of {len(said['more'])} |"
        )
    print(f"\n| “{questions['demo']}” | |\n|---|---|")
    for name, said in asked.items():
        print(f"| {name} | {_cell(said['demo'])} |")
    print("\n| general question | expected |", " | ".join(asked), "|")
    print("|---|---|" + "---|" * len(asked))
    for index, item in enumerate(questions["general"]):
        cells = " | ".join(_cell(said["general"][index]) for said in asked.values())
        print(f"| {item['question']} | {item['expect']} | {cells} |")


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 90 else line[:89] + "…"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the example's fine-tune; print the README's tables.")
    parser.add_argument("directories", nargs="*", type=Path, help="version directories to ask the same")
    parser.add_argument("--base", type=Path, default=BASE, help="default: examples/smollm2/base")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="default: examples/support/adapter")
    parser.add_argument("--json", type=Path, help="also write everything, each answer in full, to this file")
    options = parser.parse_args()
    if not (options.base / "config.json").is_file():
        print(f"error: no base model in {options.base}", file=sys.stderr)
        print("hint: python examples/smollm2/prepare.py", file=sys.stderr)
        return 1
    result = measure(options.base, options.adapter, options.directories)
    print_tables(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    broken = broken_promises(result)
    for line in broken:
        print(f"error: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
