"""Before, after, and in every precision: what a fine-tune gained, what it cost, and what of it may be chance.

The base stands for before, the merge of base and adapters for after; versions of the model repository are held against
the merge, as the build holds them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stillhouse.build.adapter import open_adapter
from stillhouse.build.answers import Reply, judge_tasks, tasks_record
from stillhouse.build.cache import cache_root, scratch_in
from stillhouse.build.checkpoint import Checkpoint, open_checkpoint
from stillhouse.build.merge import merge
from stillhouse.build.recipe import AdapterRef, Recipe
from stillhouse.build.tasks import read_tasks
from stillhouse.build.texts import evaluation_text, excerpts, token_ids, token_windows
from stillhouse.build.tokenizer_files import write_tokenizer
from stillhouse.build.verify import read_network
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.text import Tokenizer
from stillhouse.tune import stats
from stillhouse.tune.built_versions import versions_of
from stillhouse.tune.encoding import Encoder
from stillhouse.tune.evaluation_recipe import refuse_unmeasured
from stillhouse.tune.measure import Losses, Measured, Questions, Subject, checkpoint_subject
from stillhouse.tune.measure_cache import Model, measured_once
from stillhouse.tune.splits import Split, read_split

log = logging.getLogger(__name__)

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that was measured; `against` says for each model but the base which one it is held against."""

    measured: dict[str, Measured]
    against: dict[str, str]
    gates: dict[str, str | None]  # of each version: None where it keeps enough of the tasks, else why not
    labels: dict[str, str]  # what was asked: files' names by kind


def evaluate(recipe: Recipe, versions: Sequence[Path], *, no_cache: bool = False) -> Evaluation:
    """Measures the base, the merge where there are adapters, and the built `versions` (built_versions.py).

    A model that was measured before by the same questions is not measured again, but with `no_cache`. Raises UsageError
    where the recipe has nothing to measure or to gate by; StillhouseError for unsound inputs.
    """
    refuse_unmeasured(recipe)
    checkpoint = open_checkpoint(recipe.base, recipe.revision, trust_remote_code=recipe.trust_remote_code)
    root = cache_root()
    with scratch_in(root) as scratch:
        texts = scratch / "base"
        texts.mkdir()
        write_tokenizer(checkpoint.path, [], texts)
        asked, labels = questions_of(recipe, texts, checkpoint)
        models = [*_checkpoints(recipe, checkpoint, texts, scratch)]
        models += versions_of(recipe, checkpoint, versions)
        # The merge first: what is wrong with an adapter is said before the base is measured.
        found = {
            model.name: measured_once(root, model, asked, ignore=no_cache)
            for model in sorted(models, key=lambda model: model.name != TUNED)
        }
    measured = {model.name: found[model.name] for model in models}
    original = TUNED if recipe.adapters else BASE
    against = {name: BASE if name == TUNED else original for name in measured if name != BASE}
    return Evaluation(measured, against, _gates(recipe, measured, original), labels)


def _checkpoints(recipe: Recipe, checkpoint: Checkpoint, texts: Path, scratch: Path) -> Iterator[Model]:
    """The base, and the merge, which is made where it is to be measured."""

    def tuned() -> Subject:
        log.info("merging base and adapters")
        folder = merged(recipe, checkpoint, scratch)
        return checkpoint_subject(TUNED, folder, folder, read_network(folder))

    base = checkpoint_subject(BASE, checkpoint.path, texts, read_network(checkpoint.path))
    yield Model(BASE, made_of(checkpoint), lambda: base)
    if recipe.adapters:
        yield Model(TUNED, made_of(checkpoint, recipe.adapters), tuned)


def made_of(checkpoint: Checkpoint, adapters: Sequence[AdapterRef] = ()) -> dict[str, Any]:
    """All that decides what a checkpoint answers with `adapters` merged into it, run by torch on this machine."""
    from stillhouse.tune.torch_runner import device

    opened = [open_adapter(ref, checkpoint) for ref in adapters]
    merged_in = {"adapters": [[each.sha256, each.weight] for each in opened]} if opened else {}
    return {"base": checkpoint.sha256, "device": device()} | merged_in


def merged(recipe: Recipe, checkpoint: Checkpoint, scratch: Path) -> Path:
    """The build's merge of base and adapters, with its proofs."""
    adapters = [open_adapter(ref, checkpoint) for ref in recipe.adapters]
    merge(
        lambda _: None,
        base=str(checkpoint.path),
        adapters=[{"path": str(adapter.path), "weight": adapter.weight} for adapter in adapters],
        probe_texts=excerpts(evaluation_text(recipe.evaluate.text)),
        destination=str(scratch / "tuned"),
        trust_remote_code=recipe.trust_remote_code,
    )
    return scratch / "tuned"


def questions_of(recipe: Recipe, texts: Path, checkpoint: Checkpoint) -> tuple[Questions, dict[str, str]]:
    asked = recipe.evaluate
    if asked.records is None and asked.tasks is None:
        raise UsageError(
            "[evaluate] names neither records nor tasks: nothing says what the fine-tune is for",
            hint='records = "….jsonl" (instruction, input, output) or tasks = "….jsonl" (prompt, answer)',
        )
    text = evaluation_text(asked.text)
    encoder = Encoder(Tokenizer(texts), read_network(checkpoint.path).eos_token_ids)

    def records(kind: str) -> Split | None:
        path = getattr(asked, kind)
        return fitting_split(read_split(Path(path), f"evaluate.{kind}"), encoder, checkpoint) if path else None

    windows = token_windows(token_ids(text, texts / "tokenizer.json"), checkpoint.context_length)
    found = Questions(
        records=records("records"),
        general=records("general"),
        tasks=read_tasks(asked.tasks) if asked.tasks else None,
        general_tasks=read_tasks(asked.general_tasks) if asked.general_tasks else None,
        windows=windows,
    )
    kinds = ("records", "general", "tasks", "general_tasks")
    labels = {kind: Path(named).name for kind in kinds if (named := getattr(asked, kind)) is not None}
    return found, labels | {"text": text.label}


def fitting_split(split: Split, encoder: Encoder, checkpoint: Checkpoint) -> Split:
    """The split without the records that are longer than the base's context, which are named aloud."""
    sizes = [len(examples[-1]) for examples in encoder.split(split)]
    kept = [at for at, size in enumerate(sizes) if size <= checkpoint.context_length]
    if len(kept) == len(sizes):
        return split
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    said = (
        f"{split.path}: {len(sizes) - len(kept)} of {len(sizes)} records do not fit into the base's context of "
        f"{checkpoint.context_length} tokens; the longest, record {split.numbers[longest]}, has {sizes[longest]}"
    )
    if not kept:
        raise StillhouseError(said, hint="shorten them")
    log.warning("warning: %s: they are left out", said)
    return replace(
        split,
        conversations=[split.conversations[at] for at in kept],
        weights=[split.weights[at] for at in kept],
        numbers=[split.numbers[at] for at in kept],
    )


def _gates(recipe: Recipe, measured: dict[str, Measured], original: str) -> dict[str, str | None]:
    """Whether each version keeps its share of the original's right answers: the build's own judgement."""
    known = [reply.right for reply in measured[original].tasks]
    if not any(known) or recipe.evaluate.tasks is None:
        return {}
    tasks = read_tasks(recipe.evaluate.tasks)
    gates = {}
    for precision in recipe.precisions:
        for name, found in measured.items():
            if name.startswith(f"{recipe.model_name(precision)} v"):
                record = tasks_record(tasks, known, [reply.right for reply in found.tasks])
                gates[name] = judge_tasks(record, recipe.gate_of(precision))
    return gates


def figures(done: Evaluation) -> list[dict[str, Any]]:
    """For each model its figures with their intervals, and what changed against the one that it is held against."""
    rows = []
    for name, found in done.measured.items():
        row: dict[str, Any] = {"model": name, **_own_figures(found)}
        if name in done.against:
            other = done.measured[done.against[name]]
            row |= {"against": other.name, "change": changes_of(found, other), "gate": done.gates.get(name)}
        rows.append(row)
    return rows


def _own_figures(found: Measured) -> dict[str, Any]:
    perplexities = {"records": found.records, "general": found.general, "text": found.text}
    row: dict[str, Any] = {
        f"{kind}_perplexity": asdict(stats.perplexity(losses.nats, losses.tokens))
        for kind, losses in perplexities.items()
        if losses.nats
    }
    for kind, replies in _by_form(found).items():
        row[f"{kind}_accuracy"] = asdict(stats.share([reply.right for reply in replies]))
    if found.answer_tokens:
        row["answer_tokens"] = asdict(stats.mean(found.answer_tokens)) | {"cut": found.answers_cut}
    return row


def _by_form(found: Measured) -> dict[str, list[Reply]]:
    """The replies by what they are: exact match or multiple choice, the fine-tune's own or general."""
    named = {
        "exact_match": [reply for reply in found.tasks if reply.tokens is not None],
        "multiple_choice": [reply for reply in found.tasks if reply.tokens is None],
        "tasks": found.tasks,
        "general_tasks": found.general_tasks,
    }
    if not named["exact_match"] or not named["multiple_choice"]:
        del named["tasks"]  # then it says nothing more
    return {kind: replies for kind, replies in named.items() if replies}


def changes_of(found: Measured, other: Measured) -> dict[str, Any]:
    """What changed, each with its interval and whether that is more than chance: None where too few were asked."""
    changes: dict[str, Any] = {}
    for kind in ("records", "general", "text"):
        now, then = getattr(found, kind), getattr(other, kind)
        if now.nats:
            changes[f"{kind}_perplexity_ratio"] = _ratio(now, then)
    before = _by_form(other)
    for kind, replies in _by_form(found).items():
        now_right, then_right = ([reply.right for reply in part] for part in (replies, before[kind]))
        changes[f"{kind}_accuracy"] = asdict(stats.share_difference(now_right, then_right)) | {
            "mcnemar_p": stats.mcnemar(now_right, then_right),
            "more_than_chance": stats.more_right_than_chance(now_right, then_right),
        }
    if found.answer_tokens:
        longer = stats.difference(found.answer_tokens, other.answer_tokens)
        changes["answer_tokens"] = asdict(longer) | {"more_than_chance": longer.more_than_chance(0.0)}
    return changes


def _ratio(now: Losses, then: Losses) -> dict[str, Any]:
    ratio = stats.perplexity_ratio(now.nats, then.nats, now.tokens)
    return asdict(ratio) | {"more_than_chance": ratio.more_than_chance(1.0)}
