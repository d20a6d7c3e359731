"""LoRA training on transformers' Trainer and peft: what the recipe asks for, in their words.

The same code runs on a CPU, on a GPU, and on several (accelerate launch -m stillhouse.cli.main tune …).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from stillhouse.build.checkpoint import Checkpoint
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.encoding import Example, collate
from stillhouse.tune.machine import Machine
from stillhouse.tune.settings import TuneOptions

Groups = Sequence[Sequence[Example]]


def load_model(checkpoint: Checkpoint, options: TuneOptions, machine: Machine) -> Any:
    """The base with a LoRA on it: a fresh one by the recipe's seed, or the earlier adapter that it starts from."""
    set_seed(options.seed)
    dtype = torch.bfloat16 if machine.precision == "bf16" and machine.cuda else torch.float32
    more: dict[str, Any] = {}
    if options.qlora:
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        more = {"quantization_config": four_bit, "device_map": {"": machine.local_rank}}
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, **more
    )
    if report["missing_keys"]:
        raise StillhouseError(
            f"base: {checkpoint.path} lacks {min(report['missing_keys'])}", hint="copy or download the checkpoint again"
        )
    if options.qlora:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.gradient_checkpointing)
    if options.start_from is not None:
        return PeftModel.from_pretrained(model, options.start_from, is_trainable=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        use_rslora=options.rslora,
        use_dora=options.dora,
    )
    return get_peft_model(model, lora)


def steps_an_epoch(sequences: int, options: TuneOptions, machine: Machine) -> int:
    """Optimizer steps in a pass over the training data."""
    batches = math.ceil(sequences / (options.batch_size * machine.processes))
    return math.ceil(batches / options.accumulation)


def arguments(options: TuneOptions, machine: Machine, run: Path, steps: int) -> TrainingArguments:
    """The recipe in transformers' words; when to evaluate and save, the Observer says."""
    more: dict[str, Any] = {}
    if options.gradient_checkpointing:
        # transformers 5 renames it on its way to 6.
        word = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
        more = {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    asked = TrainingArguments(
        output_dir=str(run),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        warmup_steps=round(options.warmup * steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        optim="adamw_torch",
        seed=options.seed,
        bf16=machine.precision == "bf16",
        fp16=machine.precision == "fp16",
        use_cpu=not machine.cuda,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is to be seen
        include_num_input_tokens_seen="all",
        eval_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        **more,
    )
    if machine.cuda and machine.processes == 1:
        asked._n_gpu = 1  # more GPUs are for accelerate launch: DataParallel would cut a packed sequence in two
    return asked


class LoraTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """A Trainer whose validation loss is a mean over answer tokens, not over batches."""

    def __init__(self, *, validation: Groups, **more: Any) -> None:
        super().__init__(data_collator=collate, **more)
        self.remove_callback(PrinterCallback)
        self._validation = validation

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own loss, or, where examples have weights, each token's times its weight."""
        weights = inputs.pop("weights", None)
        if weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        wanted = inputs["labels"][0]
        asked = {key: value for key, value in inputs.items() if key not in ("labels", "shift_labels")}
        outputs = model(**asked)
        nats = torch.nn.functional.cross_entropy(outputs.logits[0].float(), wanted, reduction="none")  # (N,)
        # As the Trainer does: a mean over all tokens of the step, whose gradients DDP averages over the processes.
        loss = (nats * weights).sum() / num_items_in_batch * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss in nats a token and top-1 accuracy on the validation data; logged."""
        metrics = {f"eval_{key}": value for key, value in self.score(self._validation).items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, groups: Groups) -> dict[str, float]:
        """Loss in nats and top-1 accuracy over all answer tokens of `groups`, by the model as it is now."""
        model, size = self.model, self.args.per_device_train_batch_size
        was_training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        batches = [groups[at : at + size] for at in range(0, len(groups), size)]
        for batch in batches[self.args.process_index :: self.args.world_size]:
            inputs = self._prepare_inputs(collate(batch))
            wanted = inputs.pop("labels")[0]
            inputs = {key: value for key, value in inputs.items() if key not in ("shift_labels", "weights")}
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**inputs).logits[0].float()  # (N, V)
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            right = (logits.argmax(-1) == wanted).sum()
            totals += torch.tensor([loss.item(), right.item(), len(wanted)], dtype=torch.float64)
        if self.args.world_size > 1:
            device_totals = totals.float().to(self.args.device)
            totals = self.accelerator.reduce(device_totals, reduction="sum").double().cpu()
        model.train(was_training)
        loss, right, tokens = totals.tolist()
        return {"loss": loss / tokens, "accuracy": right / tokens}


@contextlib.contextmanager
def sentences(
    options: TuneOptions, kept: str = "what was saved is kept: the same command goes on from there"
) -> Iterator[None]:
    """What torch says of memory or a disk that is full becomes a line; `kept` says what there is then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StillhouseError(
            f"the GPU's memory ran out with batch_size = {options.batch_size}, max_length = {options.max_length}",
            hint=f"a smaller batch_size with more accumulation, gradient_checkpointing = true, or qlora = true; {kept}",
        ) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if not any(words in str(error) for words in ("No space left", "File too large", "write failed")):
            raise
        raise StillhouseError(f"the disk is full: {error}", hint=f"free some disk space; {kept}") from error
