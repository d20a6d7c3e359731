"""What a merge did, in figures: torch's side of the manifest's MergeRecord."""

from __future__ import annotations

import math
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from stillhouse.build.checkpoint import read_json
from stillhouse.build.fp64 import computing_in_fp64
from stillhouse.engine.errors import StillhouseError

# FP32 logits, adapter attached against merged. Rounding alone is about 2e-6 of the largest logit (measured), so a
# model with large logits gets a little more room; a wrong merge is off by a thousand times that.
MAX_LOGIT_DIFFERENCE = 1e-4
ROUNDING = 5e-6
# A model that needs FP64 makes much of the merged weights' own rounding to FP32, which is left there (3e-6, measured).
ROUNDING_IN_FP64 = 5e-5
# Below this norm of the delta over norm of the weight nothing was changed: FP32's own rounding is 6e-8.
LEAST_CHANGE = 1e-6
_AT_ONCE = 2**22  # values that are summed up at a time: they are copied twice on the way


class LogitsDiffer(StillhouseError):
    """A model does not say what it said in another form."""


def logits_of(model: Any, windows: list[Any], *, in_fp64: bool = False) -> list[Any]:
    """Logits (S, V) of each window of tokens (S,): FP32, computed in FP32 or in FP64."""
    import torch

    with torch.no_grad(), computing_in_fp64(model) if in_fp64 else nullcontext():
        return [model(input_ids=window[None], use_cache=False).logits[0].float() for window in windows]


def largest_difference(one: list[Any], other: list[Any]) -> float:
    """The largest difference of a logit."""
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def difference_of(
    one: list[Any], other: list[Any], said: str, hint: str, *, in_fp64: bool = False
) -> tuple[float, float]:
    """The largest difference of a logit, and what was allowed. Beyond it LogitsDiffer, which begins as `said`."""
    difference = largest_difference(one, other)
    rounding = ROUNDING_IN_FP64 if in_fp64 else ROUNDING
    allowed = max(MAX_LOGIT_DIFFERENCE, rounding * max(float(rows.abs().max()) for rows in one))
    if not difference <= allowed:
        raise LogitsDiffer(f"{said}: a logit differs by {difference:.2g}, more than {allowed:.2g}", hint=hint)
    return difference, allowed


def divergence(reference: list[Any], other: list[Any]) -> float:
    """Mean KL(reference ‖ other) in nats a token; logits (S, V), only the vocabulary that both have."""
    import torch

    total, tokens = 0.0, 0
    for rows, others in zip(reference, other, strict=True):
        width = min(rows.shape[-1], others.shape[-1])
        p = torch.log_softmax(rows[:, :width], -1)
        q = torch.log_softmax(others[:, :width], -1)
        total += float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum())
        tokens += len(rows)
    return total / tokens


def refuse_not_finite(model: Any, what: str) -> None:
    """Raises StillhouseError, naming the first weight that has NaN or inf."""
    import torch

    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        least, most = torch.aminmax(tensor)  # one pass, and NaN comes through
        if not (bool(least.isfinite()) and bool(most.isfinite())):
            kind = "NaN" if bool(least.isnan()) else "inf"
            raise StillhouseError(f"{what} has {kind} in {name}", hint="its training diverged, or the file was damaged")


def fingerprints(model: Any) -> dict[str, int]:
    """The sum of each parameter's bits; adding 0.0 makes -0.0 and 0.0 the same, as they are to the model."""
    import torch

    def sum_of_bits(parameter: Any) -> int:
        parts = parameter.detach().reshape(-1).split(_AT_ONCE)
        return sum(int((part + 0.0).view(torch.int32).sum(dtype=torch.int64)) for part in parts)

    return {name: sum_of_bits(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}


def changes(model: Any, base: Path) -> dict[str, Any]:
    """Which weights differ from the base's files, and by how much: norm of the delta over norm of the weight.

    Of an embedding that grew, the rows that the base has are compared. Raises StillhouseError where no weight was
    changed by more than rounding, or one by more than FP32 can say.
    """
    from safetensors import safe_open

    merged = model.state_dict()
    tied = bool(read_json(base / "config.json").get("tie_word_embeddings"))
    relative: dict[str, float] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                for own in _names_now(name, merged, tied):
                    change, grew = _relative_change(tensors.get_tensor(name), merged[own])
                    if not math.isfinite(change):
                        raise StillhouseError(
                            f"the adapters change {own} by more than FP32 can say",
                            hint="look at lora_alpha, rank and weight: their factor is far too large",
                        )
                    if change or grew:
                        relative[own.removesuffix(".weight")] = change
    if max(relative.values(), default=0.0) < LEAST_CHANGE:
        raise StillhouseError(
            "the adapters together change nothing: their deltas cancel out, or are below FP32's rounding",
            hint="a fine-tune that changes nothing is never published; were the adapters trained and saved?",
        )
    return {
        "modules_changed": sorted(relative),
        "relative_change_max": max(relative.values()),
        "relative_change_median": statistics.median(relative.values()),
    }


def check_saved(model: Any, folder: Path) -> None:
    """Raises StillhouseError unless the files in `folder` hold every weight of `model`, bit for bit."""
    import torch
    from safetensors import safe_open

    wanted = model.state_dict()
    found: set[int] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name not in wanted or not torch.equal(tensors.get_tensor(name), wanted[name]):
                    raise StillhouseError(f"{name} was not written as it was merged", hint="see the build log")
                found.add(wanted[name].data_ptr())
    # What shares its memory with another (a tied head) is written once.
    lost = [name for name, tensor in wanted.items() if tensor.data_ptr() not in found]
    if lost:
        raise StillhouseError(f"{lost[0]} was merged but not written", hint="see the build log")


def _relative_change(old: Any, new: Any) -> tuple[float, bool]:
    rows = min(len(old), len(new))
    old_rows = old.float()
    norm = float(old_rows.norm())
    change = float((new[:rows] - old_rows[:rows]).norm()) / norm if norm else float(new[:rows].norm())
    return change, len(old) != len(new)


def _names_now(name: str, merged: dict[str, Any], tied: bool) -> list[str]:
    """The weights that the base's tensor `name` has become: two where a tied embedding and head are tied no longer."""
    names = [name] if name in merged else []
    head = merged.get("lm_head.weight")
    if names and tied and name.endswith("embed_tokens.weight") and head is not None:
        names += ["lm_head.weight"] if head.data_ptr() != merged[name].data_ptr() else []
    return names
