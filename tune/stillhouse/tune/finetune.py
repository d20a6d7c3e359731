"""A fine-tune from recipe to adapter folder: prepared, trained or resumed, and published whole.

The run's folder is `<output>-runs/<hash of all inputs>`: the same recipe finds it again after a kill and goes on from
the last whole checkpoint. One that is to train again has a folder named after the result that it replaces, too. The
result is built beside `output` and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.build.adapter import open_adapter
from stillhouse.build.checkpoint import Checkpoint, open_checkpoint
from stillhouse.build.recipe import AdapterRef
from stillhouse.build.tokenizer_files import write_tokenizer
from stillhouse.build.verify import read_network
from stillhouse.engine.directory import held, sha256_of
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.text import Tokenizer
from stillhouse.tune import card as cards
from stillhouse.tune import replacing
from stillhouse.tune.encoding import Encoder, Example, fitting, pack
from stillhouse.tune.machine import Machine, machine_for
from stillhouse.tune.revisions import TUNE, code_of
from stillhouse.tune.settings import ALL_LINEAR, PLACES, TuneOptions, TuneRecipe
from stillhouse.tune.splits import Split, find_split, read_split

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its model is loaded: where it lies, what it is made from, its sequences for each split."""

    recipe: TuneRecipe
    checkpoint: Checkpoint
    machine: Machine
    data: dict[str, Any]
    sequences: dict[str, list[list[Example]]]
    inputs: str
    run: Path

    @property
    def options(self) -> TuneOptions:
        return self.recipe.tune


def tune(recipe: TuneRecipe, *, force: bool = False) -> tuple[Path, dict[str, Any], bool] | None:
    """Trains what `recipe` asks for; returns the adapter's folder, its card, and whether this run made it.

    None in the processes of a distributed run that are not the first. Raises UsageError for settings that make no
    sense on this base, data or machine, StillhouseError where the run diverged or another one holds its folder.
    """
    output = Path(recipe.tune.output)
    replacing.restore(output)
    replacing.hold_replaceable(output, cards.CARD, "stillhouse tune")
    prepared = prepare(recipe)
    known = cards.read(output)
    same = known is not None and known["inputs"] == prepared.inputs
    if known is not None and same and not force:
        return (output, known, False) if prepared.machine.rank == 0 else None
    if output.exists() and not force:
        raise UsageError(
            f"{output} exists and was made from other inputs, or by another version of the code",
            hint="name another output in [tune], or replace it with --force",
        )
    if same:  # the run's folder is at its end: the new training, and what goes on from its kill, has another
        replaced = sha256_of(output / cards.CARD)
        prepared = replace(prepared, run=prepared.run.with_name(f"{prepared.run.name}-{replaced[:8]}"))
    prepared.run.mkdir(parents=True, exist_ok=True)
    with _held(prepared.run, prepared.machine):
        from stillhouse.tune.training_run import train

        finished = train(prepared)
        if finished is None:
            return None
        cards.publish(finished, output)
        return output, finished.card, True


def prepare(recipe: TuneRecipe) -> Prepared:
    """Everything that can be refused before a weight is loaded."""
    checkpoint = open_checkpoint(recipe.base, recipe.revision)
    options = recipe.tune
    if "max_length" not in options.model_fields_set and options.max_length > checkpoint.context_length:
        options = options.model_copy(update={"max_length": checkpoint.context_length})
        recipe = recipe.model_copy(update={"tune": options})
    if checkpoint.quantized:
        raise StillhouseError(
            f"base: {checkpoint.path} is quantized; LoRA is trained on the float checkpoint",
            hint="name the unquantized base; qlora = true quantizes it while training (on a GPU)",
        )
    _hold_against_base(options, checkpoint)
    machine = machine_for(options)
    splits = _read_splits(options)
    encoder = _encoder(checkpoint)
    data: dict[str, Any] = {}
    sequences: dict[str, list[list[Example]]] = {}
    for name, split in splits.items():
        sequences[name], data[name] = _sequences(split, encoder, options)
    _hold_against_data(options, machine, sequences)
    inputs = _inputs_hash(recipe, checkpoint, machine, splits)
    run = Path(f"{options.output}-runs") / inputs[:16]
    return Prepared(recipe, checkpoint, machine, data, sequences, inputs, run)


def _hold_against_base(options: TuneOptions, checkpoint: Checkpoint) -> None:
    if options.max_length > checkpoint.context_length:
        raise UsageError(
            f"tune.max_length is {options.max_length}, the base's context is {checkpoint.context_length} tokens"
        )
    if options.start_from is not None:
        open_adapter(AdapterRef(path=options.start_from), checkpoint)
        return
    modules = {name.split(".")[-2] for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    modules -= {"embed_tokens", "lm_head"}
    if options.targets != ALL_LINEAR and (unknown := [name for name in options.targets if name not in modules]):
        raise UsageError(
            f"tune.targets: this base has no {unknown[0]!r}",
            hint=f'it has: {", ".join(sorted(modules))}; or "{ALL_LINEAR}"',
        )
    if options.r > int(checkpoint.config["hidden_size"]):
        raise UsageError(
            f"tune.r is {options.r}, more than the base's width of {checkpoint.config['hidden_size']}",
            hint="8 to 64 is common",
        )


def _read_splits(options: TuneOptions) -> dict[str, Split]:
    """The splits that the recipe names; train is always there, validation where early stopping needs it."""
    named = {split: getattr(options, split) for split in ("train", "validation", "test")}
    if options.data is not None:
        named = {split: find_split(Path(options.data), split) for split in named}
    for split, what_for in (("train", ""), ("validation", ", which early stopping needs")):
        if named[split] is None and (split == "train" or options.patience):
            raise StillhouseError(
                f"{options.data} has no {split}.jsonl or {split}.parquet{what_for}",
                hint="patience = 0 goes without; or make the dataset again with a larger split.validation"
                if what_for
                else "'stillhouse data prepare' makes a dataset",
            )
    return {split: read_split(Path(path), split) for split, path in named.items() if path is not None}


def _encoder(checkpoint: Checkpoint) -> Encoder:
    """The engine's text door over the base's tokenizer, as a build would write it."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(checkpoint.path, [], Path(folder))
        text = Tokenizer(Path(folder))
    ends = read_network(checkpoint.path).eos_token_ids
    if not ends:
        raise StillhouseError(
            f"base: {checkpoint.path} has no eos_token_id: an answer would never end", hint="put it into config.json"
        )
    return Encoder(text, ends)


def _sequences(split: Split, encoder: Encoder, options: TuneOptions) -> tuple[list[list[Example]], dict[str, Any]]:
    """The split's sequences, and what the card says of it; too long examples are left out and counted, aloud."""
    examples = [example for of_one in encoder.split(split) for example in of_one]
    kept = fitting(examples, options.max_length)
    if not kept:
        raise StillhouseError(
            f"{split.name}: all {len(examples)} examples are longer than max_length = {options.max_length} tokens",
            hint="raise tune.max_length",
        )
    if len(kept) < len(examples):
        log.warning(
            "warning: %s: %d of %d examples are longer than max_length = %d tokens and left out",
            split.name, len(examples) - len(kept), len(examples), options.max_length,
        )  # fmt: skip
    record = {
        "file": split.path.name,
        "sha256": split.sha256,
        "records": len(split.conversations),
        "examples": len(kept),
        "too_long": len(examples) - len(kept),
        "tokens": sum(map(len, kept)),
        "answer_tokens": sum(len(example.answer) for example in kept),
    }
    if options.packing and split.name == "train":
        groups = pack(kept, options.max_length, options.seed)
        return groups, record | {"packed_sequences": len(groups)}
    return [[example] for example in kept], record


def _hold_against_data(options: TuneOptions, machine: Machine, sequences: dict[str, list[list[Example]]]) -> None:
    batch = options.batch_size * options.accumulation * machine.processes
    if len(sequences["train"]) < machine.processes:
        raise UsageError(f"{len(sequences['train'])} training sequences for {machine.processes} processes")
    steps = max(1, -(-len(sequences["train"]) // batch)) * options.epochs
    for key in ("evaluate_every_steps", "save_every_steps"):
        every = getattr(options, key)
        if every is not None and every > steps:
            raise UsageError(
                f"tune.{key} is {every}, but the whole run has {steps} steps "
                f"({len(sequences['train'])} sequences, {batch} a step, {options.epochs} epochs)",
                hint=f"at most {steps}, or leave it out: once an epoch",
            )


def _inputs_hash(recipe: TuneRecipe, checkpoint: Checkpoint, machine: Machine, splits: dict[str, Split]) -> str:
    """The sha256 over all that decides the result: base, data, earlier adapter, settings, machine, code."""
    earlier = recipe.tune.start_from
    said = {
        "base": checkpoint.sha256,
        "data": {name: split.sha256 for name, split in splits.items()},
        "start_from": open_adapter(AdapterRef(path=earlier), checkpoint).sha256 if earlier else None,
        "settings": recipe.tune.model_dump(exclude=PLACES),
        "machine": {"cuda": machine.cuda, "precision": machine.precision, "processes": machine.processes},
        "code": code_of(TUNE),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _held(run: Path, machine: Machine) -> contextlib.AbstractContextManager[None]:
    """The run's folder belongs to one run; of a distributed one, its first process holds it."""
    busy = StillhouseError(f"another process is training in {run}", hint="wait for it, or end it")
    return held(run, busy) if machine.rank == 0 else contextlib.nullcontext()
