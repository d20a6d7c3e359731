"""Merge: a base and its LoRA adapters become one FP32 checkpoint, with the proof that it says the same.

Runs in a worker process; the merging itself is peft's.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from stillhouse.build import proof, vocabulary, whole
from stillhouse.build.adapter import WEIGHTS, is_vocabulary, place_of, unknown_words
from stillhouse.build.checkpoint import read_json
from stillhouse.build.tensors import read_header
from stillhouse.build.tokenizer_files import tokenizer_source, write_tokenizer
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

# FP32 logits, adapter attached against merged. Rounding alone is about 2e-6 of the largest logit (measured), so a
# model with large logits gets a little more room; a wrong merge is off by a thousand times that.
MAX_LOGIT_DIFFERENCE = 1e-4
ROUNDING = 5e-6
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
    merged, are compared on. Raises StillhouseError for NaN, a fine-tune that changes nothing, or a merge that does not
    say the same.
    """
    import torch

    torch.manual_seed(0)
    folder = Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    model, unread = _load(Path(base), trust_remote_code)
    share(0.2)
    proof.refuse_not_finite(model, f"base: {base}")
    paths = [Path(adapter["path"]) for adapter in adapters]
    rows = model.get_input_embeddings().weight.shape[0]
    windows = _windows(Path(base), paths, folder, probe_texts, rows, trust_remote_code)
    before = merged = proof.logits_of(model, windows) if adapters else []
    if not all(bool(rows_.isfinite().all()) for rows_ in before):
        raise StillhouseError(f"base: {base} gives logits that are not finite", hint="is its config.json its own?")
    differences: list[tuple[float, float]] = []
    for index, adapter in enumerate(adapters):
        model, merged, own = _merge_one(
            model, Path(base), Path(adapter["path"]), float(adapter["weight"]), windows, rows, first=index == 0
        )
        differences.append(own)
        share(0.2 + 0.5 * (index + 1) / len(adapters))
    vocabulary.refuse_tokens_without_rows(folder, paths, model.get_input_embeddings().weight.shape[0])
    record: dict[str, Any] = {"modules_changed": [], "max_logit_difference": 0.0}
    if adapters:
        nearest = max(differences, key=lambda pair: pair[0] / pair[1])
        record |= {"max_logit_difference": nearest[0], "allowed_logit_difference": nearest[1]}
        record |= proof.changes(model, Path(base))
        record |= {"kl_from_base": proof.divergence(before, merged), "kl_tokens": sum(map(len, windows))}
    warnings_ = [f"base: {name} has no place in the model and is left out" for name in unread]
    warnings_ += [f"adapter {path.name}: peft does not know {word}" for path in paths for word in unknown_words(path)]
    if warnings_:
        record["warnings"] = warnings_
    share(0.8)
    _save(model, folder)
    if trust_remote_code:
        _drop_own_code(model, windows, Path(base), folder)
    share(1.0)
    return record


def _load(base: Path, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """The base in FP32, and what of its files has no place in it.

    A weight that its files lack would be made up, a bias that the model has no place for changed what it says: refused.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, where they can be named
        )
    except Exception as error:  # what a config may say is endless, and so is what transformers raises for it
        raise StillhouseError(f"base: {base} cannot be loaded: {_reason(error)}", hint="see the build log") from error
    if report["mismatched_keys"]:
        name, found, wanted = min(report["mismatched_keys"])
        raise StillhouseError(
            f"base: {base} has {name} as {list(found)}, its config.json makes it {list(wanted)}",
            hint="copy or download the checkpoint again",
        )
    if report["missing_keys"]:
        raise StillhouseError(
            f"base: {base} lacks {min(report['missing_keys'])}", hint="copy or download the checkpoint again"
        )
    unread = sorted(name for name in report["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    known = {name for name, _ in model.named_modules()}
    if bias := next((name for name in unread if name.endswith(".bias") and name.removesuffix(".bias") in known), None):
        raise StillhouseError(
            f"base: {base} has {bias}, for which its config.json makes no place",
            hint="is its config.json its own? (attention_bias, mlp_bias)",
        )
    if hasattr(model.config, "quantization_config"):  # null, which the export does not take for none
        del model.config.quantization_config
    return model.eval(), unread


def _merge_one(
    model: Any, base: Path, path: Path, weight: float, windows: list[Any], rows: int, *, first: bool
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
    with_adapter = proof.logits_of(attached, windows)
    vocabulary.untie(attached.get_base_model())
    try:
        merged = attached.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft's kinds of LoRA raise what they like
        raise StillhouseError(
            f"adapter: {path} cannot be merged: {_reason(error)}", hint="see the build log"
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
    logits = proof.logits_of(merged, windows)
    difference = proof.largest_difference(with_adapter, logits)
    allowed = max(MAX_LOGIT_DIFFERENCE, ROUNDING * max(float(rows.abs().max()) for rows in with_adapter))
    if not difference <= allowed:
        raise StillhouseError(
            f"adapter: {path}: merged and attached differ by {difference:.2g} in a logit, more than {allowed:.2g}",
            hint="an adapter that depends on its input (aLoRA, a router) cannot be merged; see the build log",
        )
    return merged, logits, (difference, allowed)


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
            f"adapter: {path} cannot be attached: {_reason(error)}", hint="was it trained on this base?"
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
            f"tokenizer: {tokenizer_source(base, adapters)} has one that cannot be read: {_reason(error)}",
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


def _drop_own_code(model: Any, windows: list[Any], base: Path, folder: Path) -> None:
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
    difference = proof.largest_difference(proof.logits_of(model, windows), proof.logits_of(plain, windows))
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise StillhouseError(
            f"base: {base} computes something else than a plain {architecture} (a logit differs by {difference:.2g})",
            hint="its own code cannot be exported",
        )


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong; torch's own first line only says where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return lines[1]
    return lines[0] if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {lines[0]}"
