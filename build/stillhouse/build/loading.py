"""A base as transformers loads it, refused where its files and its config say two things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.engine.errors import StillhouseError


def load_base(base: Path, trust_remote_code: bool) -> tuple[Any, list[str]]:
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
        raise StillhouseError(f"base: {base} cannot be loaded: {reason_of(error)}", hint="see the build log") from error
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


def reason_of(error: Exception) -> str:
    """The line of an error that says what is wrong; torch's own first line only says where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        return lines[1]
    return lines[0] if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {lines[0]}"
