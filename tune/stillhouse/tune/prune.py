"""Prune: heads and layers that matter least go, LoRA heals what is left, and a report says what it was worth.

What is pruned is the merge of base and adapters; the result is a plain checkpoint, a new `base` for the build.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stillhouse.build.cache import cache_root, scratch_in
from stillhouse.build.checkpoint import open_checkpoint
from stillhouse.build.recipe import AdapterRef, Recipe
from stillhouse.build.tokenizer_files import write_tokenizer
from stillhouse.build.verify import read_network
from stillhouse.engine.durable import write_text
from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.tune import importance, replacing, stats, surgery
from stillhouse.tune.costs import costs_of
from stillhouse.tune.encoding import Example
from stillhouse.tune.evaluation import BASE, Evaluation, changes_of, figures, made_of, merged, questions_of
from stillhouse.tune.evaluation_recipe import refuse_unmeasured
from stillhouse.tune.finetune import prepare, tune
from stillhouse.tune.measure import Measured, checkpoint_subject
from stillhouse.tune.measure_cache import Model, measured_once
from stillhouse.tune.prune_options import REPORT, PruneOptions
from stillhouse.tune.settings import TuneRecipe
from stillhouse.tune.torch_runner import load
from stillhouse.tune.training import sentences
from stillhouse.tune.training_run import Diverged

log = logging.getLogger(__name__)

WHOLE, PRUNED, HEALED = "whole", "pruned", "healed"
_KEPT = "pruning begins anew; nothing that was there is lost"
_WORTH = 1.05  # a model that is not this much faster, or as much smaller, has gained nothing


def prune(
    recipe: Recipe,
    tuning: TuneRecipe,
    options: PruneOptions,
    *,
    force: bool = False,
    no_cache: bool = False,
    on_stage: Callable[[str], None] = lambda _: None,
) -> tuple[Path, dict[str, Any]]:
    """Prunes, heals, measures; returns the checkpoint's folder and the report.

    Where the recipe gates its fine-tune ([evaluate] better, not_worse), `against_base` says what the gate looks at.
    What was measured before by the same questions, as base and fine-tune by `evaluate`, is not measured again, but with
    `no_cache`.

    Raises UsageError for what this model does not allow, StillhouseError for unsound inputs.
    """
    output = Path(options.output)
    replacing.restore(output)
    replacing.hold_replaceable(output, REPORT, "stillhouse prune")
    if output.exists() and not force:
        raise UsageError(f"{output} exists", hint="name another output in [prune], or replace it with --force")
    if output == Path(recipe.base):
        raise UsageError(f"prune.output is the base, {output}", hint="name another output in [prune]")
    gated = bool(recipe.adapters and (recipe.evaluate.better or recipe.evaluate.not_worse))
    if gated:
        refuse_unmeasured(recipe)
    checkpoint = open_checkpoint(recipe.base, recipe.revision)
    _hold_against_base(options, checkpoint.config)
    examples = [example for group in prepare(tuning).sequences["train"] for example in group]
    examples = random.Random(tuning.tune.seed).sample(examples, min(options.examples, len(examples)))
    root = cache_root()
    with sentences(tuning.tune, _KEPT), replacing.beside(output) as folder, scratch_in(root):
        on_stage("merge")
        whole = _whole(recipe, folder)
        on_stage("importance")
        pruned, cut = _cut(whole, examples, options, folder / PRUNED)
        on_stage("heal")
        healed = _heal(pruned, recipe, tuning, options, folder)
        smaller = {PRUNED: pruned, HEALED: healed}
        asked = questions_of(recipe, whole, checkpoint)[0]
        on_stage("measure")
        models = [_model(WHOLE, whole, made_of(checkpoint, recipe.adapters))]
        models += [_model(name, path, made_of(open_checkpoint(str(path)))) for name, path in smaller.items()]
        models += [_model(BASE, checkpoint.path, made_of(checkpoint), texts=whole)] if gated else []
        measured = {model.name: measured_once(root, model, asked, ignore=no_cache) for model in models}
        base = measured.pop(BASE, None)
        on_stage("measure speed")
        costs = costs_of({WHOLE: whole, HEALED: healed})
        costs[PRUNED] = costs[HEALED]  # the healed one's shape: healing only changes numbers
        report = _report(measured, costs, cut, options)
        report |= {"against_base": changes_of(measured[HEALED], base)} if base else {}
        result = folder / "result"
        result.mkdir()
        for file in [file for file in healed.iterdir() if file.is_file()]:
            file.rename(result / file.name)
        write_text(result / REPORT, json.dumps(report, indent=1) + "\n")
        replacing.put(result, output)
    return output, report


def _model(name: str, weights: Path, says: dict[str, Any], texts: Path | None = None) -> Model:
    return Model(name, says, lambda: checkpoint_subject(name, weights, texts or weights, read_network(weights)))


def _hold_against_base(options: PruneOptions, config: dict[str, Any]) -> None:
    if options.layers >= int(config["num_hidden_layers"]):
        raise UsageError(f"prune.layers is {options.layers}, the model has {config['num_hidden_layers']}")
    if options.heads and int(config["num_attention_heads"]) == 1:
        raise UsageError("prune.heads: the model has a single head", hint="heads = 0, and layers = 1 or more")


def _whole(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint that is pruned: the build's merge, or the base where there are no adapters."""
    checkpoint = open_checkpoint(recipe.base, recipe.revision)
    if recipe.adapters:
        return merged(recipe, checkpoint, folder)
    whole = folder / WHOLE
    whole.mkdir()
    load(checkpoint.path).save_pretrained(whole)
    write_tokenizer(checkpoint.path, [], whole)
    return whole


def _cut(whole: Path, examples: list[Example], options: PruneOptions, target: Path) -> tuple[Path, dict[str, Any]]:
    """The pruned checkpoint in `target`, and what was taken out of it."""
    model = load(whole)
    config, count = model.config, len(model.model.layers)
    kv_heads = config.num_key_value_heads
    cut, heads = surgery.Cut(0, 0, 0.0), [[0.0] * config.num_attention_heads] * count
    if options.heads:
        cut = surgery.nearest_cut(config, options.heads)
        heads = importance.head_importance(model, examples)
    of_layers = importance.layer_importance(model, examples) if options.layers else [0.0] * count
    gone = sorted(range(count), key=of_layers.__getitem__)[: options.layers]
    kept = [
        surgery.choose_heads(heads[layer], kv_heads, cut, layer) for layer in range(count) if layer not in set(gone)
    ]
    smaller = surgery.cut_out(model, kept)
    smaller.save_pretrained(target)
    write_tokenizer(whole, [], target)
    record = {
        "heads_asked": options.heads,
        "heads_share": cut.share,
        "heads_a_group": cut.heads_a_group,
        "groups": cut.groups,
        "layers": sorted(gone),
        "layer_importance": of_layers if options.layers else None,
        "kept_heads": {str(layer.layer): layer.heads for layer in kept},
    }
    return target, record


def _heal(pruned: Path, recipe: Recipe, tuning: TuneRecipe, options: PruneOptions, folder: Path) -> Path:
    """The pruned checkpoint with a LoRA of [tune] trained on it and merged, or itself where no epochs are asked for."""
    if not options.heal_epochs:
        return pruned
    # In a folder of its own: `folder` is locked by this process, and putting a result locks where it lies.
    asked = tuning.tune.model_copy(
        update={"epochs": options.heal_epochs, "output": str(folder / "healing" / "adapter"), "start_from": None,
                "evaluate_every_steps": None, "save_every_steps": None}
    )  # fmt: skip
    try:
        done = tune(tuning.model_copy(update={"base": str(pruned), "revision": None, "tune": asked}))
    except UsageError:
        raise
    except StillhouseError as error:  # what it says of kept checkpoints does not hold here: they go with the rest
        reason = f"diverged: {error.reason}" if isinstance(error, Diverged) else str(error)
        raise StillhouseError(
            f"healing: {reason}; nothing of it is kept, and it is not resumed",
            hint="a lower learning_rate or a smaller batch_size in [tune], or heal_epochs = 0",
        ) from error
    if done is None:
        raise StillhouseError("pruning runs in one process", hint="without accelerate launch")
    smaller = recipe.model_copy(update={"base": str(pruned), "adapters": [AdapterRef(path=str(done[0]))]})
    (folder / HEALED).mkdir()
    return merged(smaller, open_checkpoint(str(pruned)), folder / HEALED)


def _report(
    measured: dict[str, Measured], costs: dict[str, dict[str, float]], cut: dict[str, Any], options: PruneOptions
) -> dict[str, Any]:
    done = Evaluation(measured, {PRUNED: WHOLE, HEALED: WHOLE}, {}, {})
    rows = [row | {"costs": costs[row["model"]]} for row in figures(done)]
    return {
        "cut": cut,
        "options": options.model_dump(exclude={"output"}),
        "models": rows,
        "verdict": verdict_of(measured, costs),
    }


def verdict_of(measured: dict[str, Measured], costs: dict[str, dict[str, float]]) -> str:
    """What pruning gained in size and in speed, each for itself, and what it cost; that it gained nothing, if so."""
    parts = {"parameters": "fewer parameters", "kv_bytes_per_token": "less KV cache a token"}
    saved = {words: 1 - costs[HEALED][key] / costs[WHOLE][key] for key, words in parts.items()}
    faster = costs[HEALED]["decode_tokens_per_s"] / costs[WHOLE]["decode_tokens_per_s"]
    size = ", ".join(f"{100 * share:.1f}% {words}" for words, share in saved.items() if share)
    speed = f"{100 * (faster - 1):+.0f}% decode tokens/s"
    speed = speed if faster >= _WORTH else f"not faster ({speed})"
    now, then = measured[HEALED].text, measured[WHOLE].text
    ratio = stats.perplexity_ratio(now.nats, then.nats, now.tokens)
    cost = f"general perplexity × {ratio.value:.3f} [{ratio.low:.3f}–{ratio.high:.3f}]"
    said = f"{size}; {speed}; for {cost}"
    if faster < _WORTH and max(saved.values()) < _WORTH - 1:
        return f"pruning gains nothing worth having on this model: {said}"
    return said
