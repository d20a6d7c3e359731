"""Merge: a base and its LoRA adapters become one FP32 checkpoint, with the proof that it says the same.

Runs in a worker process; the merging itself is peft's.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import warnings
from pathlib import Path
from typing import Any

from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

log = logging.getLogger(__name__)

# FP32 logits, adapter attached against merged. Rounding alone is about 2e-6 of the largest logit (measured), so a
# model with large logits gets a little more room; a wrong merge is off by a thousand times that.
MAX_LOGIT_DIFFERENCE = 1e-4
ROUNDING = 5e-6
PROBE_TOKENS = 64
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


def merge(
    share: Share, *, base: str, adapters: list[dict[str, Any]], probe_text: str, destination: str
) -> dict[str, Any]:
    """Writes the merged FP32 checkpoint of `base` (a folder) to `destination` and returns the manifest's record.

    `adapters` are {"path", "weight"} in the order of merging. `probe_text` is what attached and merged are compared
    on. Raises StillhouseError for NaN, a fine-tune that changes nothing, or a merge that does not say the same.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    folder = Path(destination)
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    ).eval()
    share(0.2)
    _refuse_not_finite(model, f"base: {base}")
    tokenizer_folder = _write_tokenizer(Path(base), [Path(adapter["path"]) for adapter in adapters], folder)
    tokens = _probe_tokens(tokenizer_folder, probe_text, int(model.config.vocab_size))
    base_logits = merged_logits = _logits(model, tokens) if adapters else None
    difference = 0.0
    for index, adapter in enumerate(adapters):
        model, merged_logits, own = _merge_one(model, Path(adapter["path"]), float(adapter["weight"]), tokens)
        difference = max(difference, own)
        share(0.2 + 0.5 * (index + 1) / len(adapters))
    record = _changes(model, Path(base)) if adapters else {"modules_changed": []}
    record["max_logit_difference"] = difference
    if adapters:
        record["kl_from_base"] = _kl(base_logits, merged_logits)
    share(0.8)
    model.config.dtype = torch.float32
    model.save_pretrained(folder, max_shard_size="4GB")
    share(1.0)
    return record


def _merge_one(model: Any, path: Path, weight: float, tokens: Any) -> tuple[Any, Any, float]:
    """The model with one adapter merged into it, its logits, and their largest difference to the adapter attached."""
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError

    before = _fingerprints(model)
    _grow_vocabulary(model, path)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = PeftConfig.from_pretrained(str(path))
            config.inference_mode = True
            attached = PeftModel.from_pretrained(model, str(path), config=config).eval()
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StillhouseError(
            f"adapter: {path} cannot be attached: {lines[0]}", hint="was it trained on this base?"
        ) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise StillhouseError(
                f"adapter: {path} lacks weights that its adapter_config.json promises",
                hint="save the trained adapter again with save_pretrained",
            )
    _refuse_not_finite(attached, f"adapter: {path}")
    for module in attached.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", weight)
    with_adapter = _logits(attached, tokens)
    merged = attached.merge_and_unload(safe_merge=True)
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if before == _fingerprints(merged):
        raise StillhouseError(
            f"adapter: {path} changes nothing: its delta is zero" + ("" if weight else " (its weight is 0)"),
            hint="a fine-tune that changes nothing is never published; was the adapter trained and saved?",
        )
    logits = _logits(merged, tokens)
    difference = float((with_adapter - logits).abs().max())
    allowed = max(MAX_LOGIT_DIFFERENCE, ROUNDING * float(with_adapter.abs().max()))
    if not difference <= allowed:
        raise StillhouseError(
            f"adapter: {path}: merged and attached differ by {difference:.2g} in a logit, more than {allowed:.2g}",
            hint="an adapter on tied embeddings cannot be merged exactly; train it without lm_head or embed_tokens",
        )
    return merged, logits, difference


def _logits(model: Any, tokens: Any) -> Any:
    """FP32 logits (1, S, V) of `tokens` (1, S)."""
    import torch

    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def _kl(reference: Any, other: Any) -> float:
    """Mean KL(reference ‖ other) in nats a token; logits (1, S, V), only the vocabulary that both have."""
    import torch

    width = min(reference.shape[-1], other.shape[-1])
    p = torch.log_softmax(reference[..., :width].double(), -1)
    q = torch.log_softmax(other[..., :width].double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def _probe_tokens(folder: Path, text: str, vocabulary: int) -> Any:
    """Up to PROBE_TOKENS tokens (1, S) of `text`; ids that the model does not know are left out."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    ids = [token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token < vocabulary]
    return torch.tensor([ids[:PROBE_TOKENS]])


def _refuse_not_finite(model: Any, what: str) -> None:
    import torch

    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        least, most = torch.aminmax(tensor)  # one pass, and NaN comes through
        if not (bool(least.isfinite()) and bool(most.isfinite())):
            kind = "NaN" if bool(least.isnan()) else "inf"
            raise StillhouseError(f"{what} has {kind} in {name}", hint="its training diverged, or the file was damaged")


def _fingerprints(model: Any) -> dict[str, int]:
    """The sum of each parameter's bits; adding 0.0 makes -0.0 and 0.0 the same, as they are to the model."""
    import torch

    return {
        name: int((parameter.detach() + 0.0).view(torch.int32).sum(dtype=torch.int64))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _changes(model: Any, base: Path) -> dict[str, Any]:
    """Which weights differ from the base's files, and by how much: norm of the delta over norm of the weight."""
    from safetensors import safe_open

    merged = model.state_dict()
    relative: dict[str, float] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name not in merged:
                    continue
                old, new = tensors.get_tensor(name).float(), merged[name]
                rows = min(len(old), len(new))
                norm = float(old.norm())
                change = float((new[:rows] - old[:rows]).norm()) / norm if norm else 0.0
                if change or len(old) != len(new):
                    relative[name.removesuffix(".weight")] = change
    return {
        "modules_changed": sorted(relative),
        "relative_change_max": max(relative.values(), default=0.0),
        "relative_change_median": statistics.median(relative.values()) if relative else 0.0,
    }


def _grow_vocabulary(model: Any, adapter: Path) -> None:
    """An adapter that brings new tokens carries whole embeddings; the model gets as many rows before it is attached."""
    from stillhouse.build.tensors import read_header

    rows = [
        info.shape[0]
        for name, info in read_header(adapter / "adapter_model.safetensors").items()
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and "lora_" not in name
    ]
    if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows[0], mean_resizing=False)


def _write_tokenizer(base: Path, adapters: list[Path], destination: Path) -> Path:
    """The last tokenizer that an adapter brings, or the base's, as tokenizer.json with its chat template beside."""
    from transformers import AutoTokenizer

    source = next((path for path in reversed(adapters) if (path / "tokenizer.json").is_file()), base)
    if (source / "tokenizer.json").is_file() and (source / "tokenizer_config.json").is_file():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
    else:
        AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False).save_pretrained(
            destination
        )
    _lift_chat_template(destination, base)
    return destination


def _lift_chat_template(folder: Path, base: Path) -> None:
    """Older checkpoints keep the template inside tokenizer_config.json; a version has it in a file of its own."""
    from stillhouse.build.checkpoint import read_json

    template = folder / "chat_template.jinja"
    for source in (folder, base):
        if template.is_file():
            return
        if (source / template.name).is_file():
            shutil.copyfile(source / template.name, template)
        elif (source / "tokenizer_config.json").is_file():
            inside = read_json(source / "tokenizer_config.json").get("chat_template")
            if isinstance(inside, str):
                template.write_text(inside, "utf-8")
