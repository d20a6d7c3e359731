"""A smaller plain checkpoint: attention heads, whole KV groups and whole layers taken out of the weights.

Every layer keeps as many heads and KV groups as every other, so that config.json can say it: transformers, the build
and the engine load the result as any other checkpoint.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from stillhouse.engine.errors import UsageError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Cut:
    """What goes: so many heads out of every KV group, or so many whole groups; `share` of all heads, 0…1."""

    heads_a_group: int
    groups: int
    share: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of one layer: its number in the original, its KV groups, and its query heads."""

    layer: int
    groups: list[int]
    heads: list[int]


def nearest_cut(config: Any, share: float) -> Cut:
    """The cut nearest to `share` of the heads; of two as near, the one inside the groups, which keeps keys and values.

    Only cuts whose config transformers takes: Llama's wants the width to be a multiple of the heads. Raises UsageError
    where taking none away would be nearer than any of them.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = heads // kv_heads
    cuts = [Cut(count, 0, count / size) for count in range(1, size)]
    cuts += [Cut(0, count, count / kv_heads) for count in range(1, kv_heads)]
    cuts = [cut for cut in cuts if _is_taken(config, (size - cut.heads_a_group) * (kv_heads - cut.groups), cut.groups)]
    nearest = min(cuts, key=lambda cut: (abs(cut.share - share), cut.groups), default=None)
    if nearest is None or abs(nearest.share - share) >= share:
        found = ", ".join(f"{able:.3g}" for able in sorted({cut.share for cut in cuts})) or "none"
        raise UsageError(
            f"prune.heads: of {heads} heads in {kv_heads} groups nothing near {share:g} can go, for a plain checkpoint",
            hint=f"shares that can: {found}; or heads = 0 and layers = 1 or more",
        )
    return nearest


def _is_taken(config: Any, heads: int, groups_gone: int) -> bool:
    """Whether transformers takes the config with so many heads."""
    changed = {"num_attention_heads": heads, "num_key_value_heads": config.num_key_value_heads - groups_gone}
    try:
        type(config)(**(config.to_dict() | changed | {"head_dim": _head_dim(config)}))
    except (ValueError, StrictDataclassError):
        return False
    return True


def choose_heads(importance: Sequence[float], kv_heads: int, cut: Cut, layer: int) -> Kept:
    """The heads of one layer that stay: those that matter most, evenly within their groups or by whole groups."""
    size = len(importance) // kv_heads
    members = [list(range(group * size, (group + 1) * size)) for group in range(kv_heads)]
    by_group = sorted(range(kv_heads), key=lambda group: -sum(importance[head] for head in members[group]))
    groups = sorted(by_group[: kv_heads - cut.groups])
    heads = []
    for group in groups:
        best = sorted(members[group], key=lambda head: -importance[head])[: size - cut.heads_a_group]
        heads += sorted(best)
    return Kept(layer, groups, heads)


def cut_out(model: Any, kept: Sequence[Kept]) -> Any:
    """A new model of the layers, groups and heads in `kept`, with the weights that they had."""
    config = copy.deepcopy(model.config)
    config.head_dim = _head_dim(config)
    config.num_attention_heads, config.num_key_value_heads = len(kept[0].heads), len(kept[0].groups)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer.layer] for layer in kept]
    state = _cut_state(model.state_dict(), kept, config.head_dim)
    smaller = type(model)(config).to(dtype=model.dtype)
    smaller.load_state_dict(state, strict=True)
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.eval()


def _cut_state(state: dict[str, Any], kept: Sequence[Kept], head_dim: int) -> dict[str, Any]:
    places = {layer.layer: (at, layer) for at, layer in enumerate(kept)}
    cut: dict[str, Any] = {}
    for name, weight in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            cut[name] = weight
        elif int(match.group(1)) in places:
            at, layer = places[int(match.group(1))]
            cut[f"model.layers.{at}.{match.group(2)}"] = _cut_weight(match.group(2), weight, layer, head_dim)
    return cut


def _cut_weight(name: str, weight: Any, layer: Kept, head_dim: int) -> Any:
    """The rows or columns of an attention weight that belong to what is kept; other weights as they are."""
    if name.startswith("self_attn.q_proj."):
        return weight[_rows(layer.heads, head_dim)]
    if name.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
        return weight[_rows(layer.groups, head_dim)]
    if name == "self_attn.o_proj.weight":
        return weight[:, _rows(layer.heads, head_dim)]
    return weight


def _rows(blocks: Sequence[int], head_dim: int) -> Any:
    return torch.cat([torch.arange(block * head_dim, (block + 1) * head_dim) for block in blocks])


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
