"""What happens beside the training: when to evaluate, save and stop; the line, TensorBoard, whole checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from stillhouse.tune import checkpoints, watch
from stillhouse.tune.settings import TuneOptions


class Observer(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Says when to evaluate, save and stop; shows the line, feeds TensorBoard, marks checkpoints that are whole.

    `history` is what was logged before this session.
    """

    def __init__(
        self,
        options: TuneOptions,
        run: Path,
        line: watch.Line,
        *,
        history: watch.History,
        evaluate_every: int | None,
        save_every: int,
        fp16: bool,
    ) -> None:
        self._options, self._run, self._line = options, run, line
        self._evaluate_every, self._save_every = evaluate_every, save_every
        self._judge = watch.Judge(
            patience=options.patience,
            window=options.divergence_window,
            rise=options.divergence_rise,
            gradients=not fp16,
        )
        for row in history:
            self._judge.read(row)
        self._board: Any = None

    @property
    def verdict(self) -> watch.Verdict | None:
        """Why the run ends, or should not go on; None while it may."""
        return self._judge.verdict

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._board = watch.tensorboard(self._run / "tensorboard", state.global_step)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        every = self._evaluate_every
        control.should_evaluate = every is not None and (step % every == 0 or last)
        control.should_save = step % self._save_every == 0 or control.should_evaluate or last

    def on_log(self, _args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if (ended := self._judge.read(state.log_history[-1])) is not None:
            control.should_training_stop = True
            if ended.kind == "diverged":
                control.should_save = control.should_evaluate = False
        if self._board is not None:
            for key, value in logs.items():
                self._board.add_scalar(key, value, state.global_step)
        if state.is_world_process_zero and "train_runtime" not in logs:
            self._line.show(state.global_step, state.max_steps, watch.words_of(state.log_history[-200:]))

    def on_save(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if not state.is_world_process_zero:
            return
        checkpoints.mark_whole(self._run / f"checkpoint-{state.global_step}")
        checkpoints.keep(self._run, self._steps_to_keep(state.log_history))
        if self._board is not None:
            self._board.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._board is not None:
            self._board.close()

    def _steps_to_keep(self, history: watch.History) -> set[int]:
        """The checkpoint of the best validation loss, and the one to go back to if the loss should rise."""
        best = watch.best_step(history)
        good = watch.calm_step(history, self._options.divergence_window)
        before = checkpoints.last_good(self._run, good)
        return ({best} if best is not None else set()) | ({checkpoints.step_of(before)} if before else set())
