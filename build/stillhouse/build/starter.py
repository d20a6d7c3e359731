"""A recipe to start from: every key, said in a comment; a test holds it against the recipe's model."""

from __future__ import annotations

from pathlib import Path

from stillhouse.engine.errors import StillhouseError, UsageError

STARTER = """\
# stillhouse build {file}
#
# Only name and base are needed; what begins with '#' is optional. Relative paths are relative to this file.

# The models become {name}-fp16, {name}-int8 and {name}-int4.
name = "{name}"

# What the adapter was trained on: a checkpoint's folder, or a hub id (HF_TOKEN and HF_ENDPOINT hold).
base = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
# revision = "main"                 # of a hub id: a branch, a tag, or best a commit
# trust_remote_code = false         # run modelling code that the base brings; read it first

# LoRA adapters, merged in this order: folders or hub ids. None: the base is built as it is.
adapters = []
# adapters = ["my-adapter", {{ path = "another", weight = 0.5, revision = "main" }}]

# One model each; it is published only if it holds its gate against the FP32 merge.
precisions = ["fp16", "int8", "int4"]

# Where they will run: "cpu" or "cuda".
target = "cpu"

# How INT4 is made: "auto" takes the best method that fits the bytes; or "gptq", "k_quant", "hqq", "rtn".
# [quantize.int4]
# method = "auto"
# max_bytes_share = 0.425           # of the FP16 version's bytes
# keep_int8 = ["down_proj"]         # what stays at 8 bits in any case, beside the head and the embedding
# calibration = "prose.txt"         # else the model's own samples; never the text it is measured on

# What the versions are measured on. Without a text: the English prose that Python carries.
# [evaluate]
# text = "held-out.txt"             # never a text that was trained or calibrated on
# tasks = "tasks.jsonl"             # a task a line: {{"prompt": "…", "choices": ["…", "…"], "answer": 0}},
#                                   # or {{"prompt": "…", "answer": "…"}} for an exact match
# records = "held-out.jsonl"        # the rest is for `stillhouse evaluate`: answers that nobody trained on,
# general = "general.jsonl"         # and what has nothing to do with the fine-tune: was it forgotten?
# general_tasks = "tasks.jsonl"
# better = ["records_perplexity"]   # the fine-tune must beat the base in these by more than chance,
# not_worse = ["general_tasks_accuracy"]  # and not lose to it in those

# What a version must hold to be published.
# [gate.int4]
# perplexity_ratio = 1.06           # to the FP32 merge
# top1_agreement = 0.8              # share of positions with the same most likely token
# task_accuracy = 0.9               # share of the FP32 merge's accuracy on the tasks
"""


def write_recipe(directory: Path, name: str) -> Path:
    """Writes recipe.toml into `directory`. Raises UsageError where there is one already, or `name` is no name."""
    from stillhouse.build.recipe import NAME

    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r} is no model's name", hint="letters, digits, '_' and '-'")
    file = directory / "recipe.toml"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(STARTER.format(name=name, file=file))
    except FileExistsError:
        raise UsageError(f"{file} is there already", hint="name another directory, or edit it") from None
    except OSError as error:
        raise StillhouseError(f"cannot write {file}: {error.strerror}", hint="name another directory") from error
    return file
