"""Merge: a base and its LoRA adapters become one FP32 checkpoint, with the proof that it says the same.

Runs in a worker process; the merging itself is peft's.
"""

from __future__ import annotations

import gc
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from stillhouse.build import proof, vocabulary, whole
from stillhouse.build.adapter import WEIGHTS, is_vocabulary, place_of, unknown_words
from stillhouse.build.checkpoint import read_json
from stillhouse.build.loading import load_base, reason_of
from stillhouse.build.tensors import read_header
from stillhouse.build.tokenizer_files import tokenizer_source, write_tokenizer
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

log = logging.getLogger(__name__)

PROBE_TOKENS = 64  # of each excerpt of the text


def merge(
    share: Share,
    *,
    base: str,
    adapters: list[dict[str, Any]],
    probe_texts: list[str],
    destination: str,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Writes the merged FP32 checkpoint of `base` (a folder) to `destination` and returns the manifest's record.

    `adapters` are {"path", "weight"} in the order of merging. `probe_texts` are what attached and merged, and base and
    merged, are compared on: in FP32, and where they differ there, in FP64. A model whose activations are huge (a pruned
    one's, say) may say in FP32 what its rounding makes of it. Raises StillhouseError for NaN, a fine-tune that changes
    nothing, or a merge that does not say the same.
    """
    given = (Path(base), adapters, probe_texts, Path(destination), trust_remote_code)
    try:
        return _merge(share, *given)
    except proof.LogitsDiffer as error:
        log.warning("%s: once more in FP64, which tells rounding from another model", error)
    gc.collect()  # the first try's model
    return _merge(share, *given, in_fp64=True)


def _merge(
    share: Share,
    base: Path,
    adapters: list[dict[str, Any]],
    probe_texts: list[str],
    folder: Path,
    trust_remote_code: bool,
    *,
    in_fp64: bool = False,
) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    model, unread = load_base(base, trust_remote_code)
    share(0.2)
    proof.refuse_not_finite(model, f"base: {base}")
    paths = [Path(adapter["path"]) for adapter in adapters]
    rows = model.get_input_embeddings().weight.shape[0]
    windows = _windows(base, paths, folder, probe_texts, rows, trust_remote_code)
    before = merged = proof.logits_of(model, windows) if adapters else []
    if not all(bool(rows_.isfinite().all()) for rows_ in before):
        raise StillhouseError(f"base: {base} gives logits that are not finite", hint="is its config.json its own?")
    differences: list[tuple[float, float]] = []
    for index, adapter in enumerate(adapters):
        model, merged, own = _merge_one(
            model,
            base,
            Path(adapter["path"]),
            float(adapter["weight"]),
            windows,
            rows,
            first=index == 0,
            in_fp64=in_fp64,
        )
        differences.append(own)
        share(0.2 + 0.5 * (index + 1) / len(adapters))
    vocabulary.refuse_tokens_without_rows(folder, paths, model.get_input_embeddings().weight.shape[0])
    record: dict[str, Any] = {"modules_changed": [], "max_logit_difference": 0.0}
    if adapters:
        nearest = max(differences, key=lambda pair: pair[0] / pair[1])
        record |= {"max_logit_difference": nearest[0], "allowed_logit_difference": nearest[1]}
        record |= {"logits_in": "fp64"} if in_fp64 else {}
        record |= proof.changes(model, base)
        record |= {"kl_from_base": proof.divergence(before, merged), "kl_tokens": sum(map(len, windows))}
    warnings_ = [f"base: {name} has no place in the model and is left out" for name in unread]
    warnings_ += [f"adapter {path.name}: peft does not know {word}" for path in paths for word in unknown_words(path)]
    if warnings_:
        record["warnings"] = warnings_
    share(0.8)
    _save(model, folder)
    if trust_remote_code:
        _drop_own_code(model, windows, base, folder, in_fp64=in_fp64)
    share(1.0)
    return record


def _merge_one(
    model: Any, base: Path, path: Path, weight: float, windows: list[Any], rows: int, *, first: bool, in_fp64: bool
) -> tuple[Any, list[Any], tuple[float, float]]:
    """The model with one adapter merged into it, its logits, and their largest difference to the adapter attached.

    Beside that difference comes the one that was allowed. `rows` is the base's vocabulary; `first` says that no other
    adapter was merged into `model` before.
    """
    before = proof.fingerprints(model)
    tokens, tied = model.get_input_embeddings().weight.shape[0], bool(model.config.tie_word_embeddings)
    vocabulary.grow_vocabulary(model, path, weight, rows)
    alone = first and weight == 1.0
    own = {} if alone else whole.weights_before(model, path)
    attached = _attach(model, path)
    proof.refuse_not_finite(attached, f"adapter: {path}")
    _scale(attached, weight, path)
    if not alone:
        _refuse_a_start_that_moves_the_base(attached, weight, path)
        whole.add_up(attached, path, weight, own, base, tokens)
    with_adapter = proof.logits_of(attached, windows, in_fp64=in_fp64)
    vocabulary.untie(attached.get_base_model())
    try:
        merged = attached.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft's kinds of LoRA raise what they like
        raise StillhouseError(
            f"adapter: {path} cannot be merged: {reason_of(error)}", hint="see the build log"
        ) from error
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if tied:
        vocabulary.tie_as_it_is(merged)
    if before == proof.fingerprints(merged):
        raise StillhouseError(
            f"adapter: {path} changes nothing: its delta is zero" + ("" if weight else " (its weight is 0)"),
            hint="a fine-tune that changes nothing is never published; was the adapter trained and saved?",
        )
    logits = proof.logits_of(merged, windows, in_fp64=in_fp64)
    said = f"adapter: {path}: attached and merged do not say the same"
    hint = "an adapter that depends on its input (aLoRA, a router) cannot be merged; see the build log"
    return merged, logits, proof.difference_of(with_adapter, logits, said, hint, in_fp64=in_fp64)


def _attach(model: Any, path: Path) -> Any:
    """The model with the adapter attached by peft, all of its weights in use."""
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(path))
            config.inference_mode = True
            attached = PeftModel.from_pretrained(model, str(path), config=config).eval()
    except Exception as error:  # a config with a pattern that is none, a list for a table, …
        raise StillhouseError(
            f"adapter: {path} cannot be attached: {reason_of(error)}", hint="was it trained on this base?"
        ) from error
    if any("missing adapter keys" in str(warning.message) for warning in caught):
        raise StillhouseError(
            f"adapter: {path} lacks weights that its adapter_config.json promises",
            hint="save the trained adapter again with save_pretrained",
        )
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in attached.named_modules()
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
    }
    for name in read_header(path / WEIGHTS):
        place = place_of(name)
        trained = place.module in adapted or (config.bias == "all" and name.endswith(".bias"))
        if not trained and not is_vocabulary(place):
            raise StillhouseError(
                f"adapter: {path} has weights for {place.module}, which its adapter_config.json leaves out",
                hint="the file and its config do not belong together; save the trained adapter again",
            )
    return attached


def _refuse_a_start_that_moves_the_base(attached: Any, weight: float, path: Path) -> None:
    """PiSSA and OLoRA take their start out of the weight that they meet: it must be the base's, and whole."""
    start = attached.peft_config["default"].init_lora_weights
    if isinstance(start, str) and start.lower() in ("pissa", "olora"):
        raise StillhouseError(
            f"adapter: {path} was begun by {start}, whose change cannot be "
            + (f"weighted by {weight:g}" if weight != 1.0 else "added to another adapter's"),
            hint="leave its weight out" if weight != 1.0 else "name it first; of two such adapters merge one",
        )


def _scale(attached: Any, weight: float, path: Path) -> None:
    """Multiplies the adapter's products by `weight`."""
    from peft.tuners.lora import LoraLayer

    config = attached.peft_config["default"]
    if weight != 1.0 and (config.bias != "none" or config.trainable_token_indices):
        raise StillhouseError(
            f"adapter: {path} trained biases or single tokens, which cannot be weighted by {weight:g}",
            hint="leave its weight out",
        )
    if weight != 1.0 and config.use_dora:  # its magnitudes belong to the whole change
        raise StillhouseError(
            f"adapter: {path} is a DoRA, whose change cannot be weighted by {weight:g}", hint="leave its weight out"
        )
    for module in attached.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", weight)


def _windows(
    base: Path, adapters: list[Path], folder: Path, texts: list[str], vocabulary: int, trust_remote_code: bool
) -> list[Any]:
    """Up to PROBE_TOKENS tokens (S,) of each text, by the tokenizer that this writes into `folder`.

    Ids that the base does not know are left out. Raises StillhouseError where the tokenizer cannot be read.
    """
    import torch
    from transformers import AutoTokenizer

    try:
        write_tokenizer(base, adapters, folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    except (StillhouseError, OSError):
        raise
    except Exception as error:  # transformers reads a tokenizer's files without checking them
        raise StillhouseError(
            f"tokenizer: {tokenizer_source(base, adapters)} has one that cannot be read: {reason_of(error)}",
            hint="save it again: tokenizer.save_pretrained(folder)",
        ) from error
    windows = [[token for token in window if token < vocabulary] for window in ids]
    return [torch.tensor(window[:PROBE_TOKENS]) for window in windows if window]


def _save(model: Any, folder: Path) -> None:
    import torch

    model.config.dtype = torch.float32
    # A shard is copied once more while it is written.
    model.save_pretrained(folder, max_shard_size="1GB")
    proof.check_saved(model, folder)


def _drop_own_code(model: Any, windows: list[Any], base: Path, folder: Path, *, in_fp64: bool) -> None:
    """Makes the merged checkpoint one that is loaded without the base's own code, and checks that it says the same."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_json(folder / "config.json")
    config.pop("auto_map", None)
    architecture = read_json(base / "config.json")["architectures"][0]
    config |= {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for file in folder.glob("*.py"):
        file.unlink()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    own, others = (proof.logits_of(which, windows, in_fp64=in_fp64) for which in (model, plain))
    said = f"base: {base} computes something else than a plain {architecture}"
    proof.difference_of(own, others, said, "its own code cannot be exported", in_fp64=in_fp64)
