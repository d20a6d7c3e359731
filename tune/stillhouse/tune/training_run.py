"""One run: trained from its start or its last whole checkpoint to its end, then summed up.

What was measured before the first step lies in before.json, all else in the checkpoints.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.durable import write_text
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune import card as cards
from stillhouse.tune import checkpoints, training, watch
from stillhouse.tune.finetune import Prepared
from stillhouse.tune.observer import Observer

log = logging.getLogger(__name__)

BEFORE = "before.json"
_MEASURED = ("validation", "test")


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that reached its end: the checkpoint that became the result, the run's folder, and the card."""

    adapter: Path
    run: Path
    card: dict[str, Any]


class Diverged(StillhouseError):
    """The run was stopped because its loss went astray, as `reason` says."""

    def __init__(self, reason: str, kept: str) -> None:
        hint = "a lower learning_rate, more warmup, a smaller clip; save_every_steps saves more often"
        super().__init__(f"diverged: {reason}; {kept}", hint=hint)
        self.reason = reason


def train(prepared: Prepared) -> Finished | None:
    """Trains, or goes on where a killed run stopped; None in all processes but the first.

    Raises Diverged where the loss went astray; the message names the last good checkpoint, which is kept.
    """
    options, machine, run = prepared.options, prepared.machine, prepared.run
    if machine.rank == 0:
        checkpoints.drop_half(run)
    whole = checkpoints.whole_checkpoints(run)
    newest = whole[-1] if whole else None
    history = _history_of(newest)
    first = checkpoints.step_of(newest) if newest else 0
    an_epoch = training.steps_an_epoch(len(prepared.sequences["train"]), options, machine)
    steps = an_epoch * options.epochs
    evaluate_every = (options.evaluate_every_steps or an_epoch) if "validation" in prepared.sequences else None
    log.info(
        "%s step %d of %d; the run's folder is %s", "going on from" if newest else "training from", first, steps, run
    )
    line = watch.line_for_terminal(first, steps) if machine.rank == 0 else watch.LogLine(first)
    observer = Observer(
        options,
        run,
        line,
        history=history,
        evaluate_every=evaluate_every,
        save_every=options.save_every_steps or evaluate_every or an_epoch,
        fp16=machine.precision == "fp16",
    )
    began = time.monotonic()
    try:
        with training.sentences(options):
            trainer = training.LoraTrainer(
                model=training.load_model(prepared.checkpoint, options, machine),
                args=training.arguments(options, machine, run, steps),
                train_dataset=prepared.sequences["train"],
                validation=prepared.sequences.get("validation", []),
                callbacks=[observer],
            )
            before = _before(trainer, prepared)
            if first < steps and observer.verdict is None:
                trainer.train(resume_from_checkpoint=str(newest) if newest else None)
                history = trainer.state.log_history
            ended = observer.verdict
            if machine.rank == 0 and history:
                cards.draw_losses(history, run, title=prepared.recipe.name)
            if ended is not None and ended.kind == "diverged":
                raise _diverged(ended, run)
            best = _best(run, history)
            after = _after(trainer, prepared, best)
            trainable = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    finally:
        line.close()
    if machine.rank != 0:
        return None
    made = cards.Made(
        steps=watch.losses(history)[-1][0],
        best_step=checkpoints.step_of(best),
        stopped=ended.reason if ended is not None else None,
        history=history,
        before=before,
        after=after,
        trainable_parameters=trainable,
        last_session_s=round(time.monotonic() - began, 1),
    )
    return Finished(best, run, cards.compose(prepared, made))


def _history_of(checkpoint: Path | None) -> list[dict[str, Any]]:
    if checkpoint is None:
        return []
    history: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]
    return history


def _before(trainer: training.LoraTrainer, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Loss and accuracy of what the run starts from, measured once a run."""
    file = prepared.run / BEFORE
    if file.is_file():
        found: dict[str, dict[str, float]] = json.loads(file.read_text("utf-8"))
        return found
    measured = {name: trainer.score(prepared.sequences[name]) for name in _MEASURED if name in prepared.sequences}
    if prepared.machine.rank == 0:
        beside = file.with_suffix(".new")
        write_text(beside, json.dumps(measured))
        beside.replace(file)
    return measured


def _best(run: Path, history: watch.History) -> Path:
    """The checkpoint of the lowest validation loss, or the last one where there is no validation data."""
    whole = checkpoints.whole_checkpoints(run)
    best = watch.best_step(history)
    return next((path for path in whole if checkpoints.step_of(path) == best), whole[-1])


def _after(trainer: training.LoraTrainer, prepared: Prepared, best: Path) -> dict[str, dict[str, float]]:
    """Loss and accuracy of the adapter in `best`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(trainer.model, load_file(best / "adapter_model.safetensors"))
    return {name: trainer.score(prepared.sequences[name]) for name in _MEASURED if name in prepared.sequences}


def _diverged(ended: watch.Verdict, run: Path) -> Diverged:
    good = checkpoints.last_good(run, ended.good_step)
    kept = f"the last good checkpoint is kept: {good}" if good else "it did so before the first checkpoint"
    return Diverged(ended.reason, kept)
