"""The result of a fine-tune: an adapter's folder that `stillhouse build` takes as it is, with its card and its curves.

card.json is for machines, README.md for people; both say the same.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.engine.durable import write_text
from stillhouse.tune import replacing, watch
from stillhouse.tune.settings import PLACES

if TYPE_CHECKING:
    from stillhouse.tune.finetune import Prepared
    from stillhouse.tune.training_run import Finished

CARD = "card.json"
PICTURE = "loss.png"
TARGET_LOSS = 0.5  # the practice's own targets: training loss, and validation against the original
TARGET_SHARE = 0.9
_LOSS_STEPS = 20  # the training loss that is held against its target is the mean of so many steps
_TOOLS = ("torch", "transformers", "peft", "accelerate")

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Made:
    """What a run that reached its end has to say; `before` and `after` are loss and accuracy by split."""

    steps: int
    best_step: int
    stopped: str | None
    history: watch.History
    before: Scores
    after: Scores
    trainable_parameters: int
    last_session_s: float  # of a run that was resumed, the time since then


def compose(prepared: Prepared, made: Made) -> dict[str, Any]:
    """The card: what went in, how it was trained, its curves, before and after, the targets."""
    options, checkpoint = prepared.options, prepared.checkpoint
    return {
        "schema": 1,
        "name": prepared.recipe.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": prepared.inputs,
        "base": {"id": checkpoint.id, "sha256": checkpoint.sha256},
        "data": prepared.data,
        "settings": options.model_dump(exclude=PLACES),
        "start_from": Path(options.start_from).name if options.start_from else None,
        "machine": {
            "device": "cuda" if prepared.machine.cuda else "cpu",
            "precision": prepared.machine.precision,
            "processes": prepared.machine.processes,
        },
        "tools": {tool: version(tool) for tool in _TOOLS},
        "trainable_parameters": made.trainable_parameters,
        "steps": made.steps,
        "best_step": made.best_step,
        "stopped": made.stopped,
        "last_session_s": made.last_session_s,
        "before": _with_perplexity(made.before),
        "after": _with_perplexity(made.after),
        "targets": _targets(made),
        "curves": {
            "train": [[step, loss] for step, loss in watch.losses(made.history)],
            "validation": [
                [row["step"], row["eval_loss"], row["eval_accuracy"]] for row in made.history if "eval_loss" in row
            ],
        },
    }


def _with_perplexity(scores: Scores) -> Scores:
    return {split: found | {"perplexity": math.exp(min(found["loss"], 700.0))} for split, found in scores.items()}


def _targets(made: Made) -> dict[str, Any]:
    last = [loss for step, loss in watch.losses(made.history) if step <= made.best_step][-_LOSS_STEPS:]
    loss = math.fsum(last) / len(last)
    targets: dict[str, Any] = {"training_loss": {"is": loss, "target": TARGET_LOSS, "reached": loss < TARGET_LOSS}}
    if "validation" in made.after:
        after, before = made.after["validation"]["accuracy"], made.before["validation"]["accuracy"]
        targets["validation_share"] = {
            "is": after / before if before else None,  # of nothing there is no share
            "target": TARGET_SHARE,
            "reached": after >= TARGET_SHARE * before,
        }
    return targets


def read(folder: Path) -> dict[str, Any] | None:
    """The card in `folder`, or None where there is none."""
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and "inputs" in card else None


def publish(finished: Finished, output: Path) -> None:
    """Puts the adapter, its card and its curves at `output`: whole, or not at all; what was there is replaced."""
    with replacing.beside(output) as folder:
        shutil.copyfile(finished.adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        config = json.loads((finished.adapter / "adapter_config.json").read_text("utf-8"))
        for key in ("target_modules", "modules_to_save", "exclude_modules"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])  # peft keeps a set: its order is another in every process
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(finished.run / PICTURE, folder / PICTURE)
        write_text(folder / CARD, json.dumps(finished.card, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "README.md", readme(finished.card))
        replacing.put(folder, output)


def readme(card: dict[str, Any]) -> str:
    """The card for people."""
    settings, targets = card["settings"], card["targets"]
    lines = [f"# {card['name']}: a LoRA adapter for {card['base']['id']}", ""]
    lines += [
        f"Trained by `stillhouse tune` on {card['created'][:10]}; `stillhouse build` takes this folder as it is.",
        "",
    ]
    lines += ["| | before | after |", "|---|---:|---:|"]
    for split, after in card["after"].items():
        before = card["before"][split]
        lines.append(f"| {split}: perplexity of the answers | {before['perplexity']:.3f} | {after['perplexity']:.3f} |")
        lines.append(f"| {split}: next token right | {_percent(before['accuracy'])} | {_percent(after['accuracy'])} |")
    lines += ["", *(f"- {line}" for line in target_lines(targets)), ""]
    how = f"{card['steps']} steps, the best was {card['best_step']}; {card['trainable_parameters']:,} trained weights."
    lines += [how + (f" It ended early: {card['stopped']}." if card["stopped"] else ""), ""]
    lines += ["![loss](loss.png)", "", "| data | records | answer tokens | sha256 |", "|---|---:|---:|---|"]
    lines += [
        f"| {split} ({found['file']}) | {found['records']} | {found['answer_tokens']} | {found['sha256'][:16]}… |"
        for split, found in card["data"].items()
    ]
    lines += ["", "| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())]
    return "\n".join(lines) + "\n"


def target_lines(targets: dict[str, Any]) -> list[str]:
    """The practice's targets and whether they were reached, a line each."""

    def word(target: dict[str, Any]) -> str:
        return "reached" if target["reached"] else "not reached"

    loss = targets["training_loss"]
    lines = [f"training loss {loss['is']:.3f}, target below {loss['target']}: {word(loss)}"]
    if "validation_share" in targets:
        share = targets["validation_share"]
        is_now = f"{_percent(share['is'])} of the original's" if share["is"] is not None else "from nothing"
        lines.append(f"validation accuracy {is_now}, target {_percent(share['target'])}: {word(share)}")
    return lines


def draw_losses(history: watch.History, folder: Path, *, title: str) -> None:
    """Writes loss.png into `folder`: training loss by step, validation loss by evaluation, the target."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    styles: tuple[dict[str, Any], ...] = (
        {"label": "training", "color": "#9aa5b1", "linewidth": 1.0},
        {"label": "validation", "color": "#1b6ca8", "marker": "o", "markersize": 4},
    )
    for points, style in zip((watch.losses(history), watch.validation_losses(history)), styles, strict=True):
        if points:
            axes.plot([step for step, _ in points], [loss for _, loss in points], **style)
    axes.axhline(TARGET_LOSS, color="#c0392b", linewidth=0.8, linestyle=":", label=f"target {TARGET_LOSS}")
    axes.set(title=title, xlabel="step", ylabel="loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.2)
    axes.legend(frameon=False)
    beside = folder / f".{PICTURE}"
    figure.savefig(beside, dpi=150, format="png")
    plt.close(figure)
    beside.replace(folder / PICTURE)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
