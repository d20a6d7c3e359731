"""What an adapter carries whole (a norm, an embedding, a bias, some tokens' rows), and how several are added up.

peft puts such a weight in the model's place. In a merge of several adapters, or of one with a factor, what counts is
its difference to the base's own weight, as a LoRA's delta does. Runs in the merge's process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.build.adapter import WEIGHTS, place_of
from stillhouse.build.tensors import read_header
from stillhouse.engine.errors import StillhouseError

_ROWS = "trainable_tokens_delta"  # peft's name; they are the rows themselves


def weights_before(model: Any, path: Path) -> dict[str, Any]:
    """The model's own values of what the adapter at `path` carries whole, copied before it is attached."""
    now = model.state_dict()
    return {own: now[own].clone() for own in set(_carried(path).values()) if own in now}


def add_up(attached: Any, path: Path, weight: float, before: dict[str, Any], base: Path, tokens: int) -> None:
    """Sets what the adapter carries whole to `before` + `weight` × (carried - the base's own).

    `before` is from `weights_before`; `tokens` is how many rows the vocabulary had then. Raises StillhouseError where
    the adapter brings other rows for new tokens than an adapter before it: they have no base to differ from.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    carried = load_file(str(path / WEIGHTS))
    for name, own in _carried(path).items():
        if own not in before:
            continue
        at = _rows_of(attached, own) if name.endswith(_ROWS) else slice(None)
        first, now, new = _own_weight(base, own), before[own], carried[name].float()
        if ".original_module." in name:  # what the module was before it was trained: that is what it is now
            carried[name] = torch.cat([now[:tokens], new[tokens:]])
            continue
        old = torch.cat([first, now[len(first) :]])  # new tokens' rows are taken as they are
        number = torch.arange(len(now))[at]
        if bool((new != now[at])[(number >= len(first)) & (number < tokens)].any()):
            raise StillhouseError(
                f"adapter: {path} replaces the rows in {own} of new tokens that an adapter before it has brought",
                hint="merge one of the two; rows of new tokens cannot be added up",
            )
        carried[name] = torch.lerp(old[at], new, weight) + (now[at] - old[at])
    set_peft_model_state_dict(attached, carried)


def _carried(path: Path) -> dict[str, str]:
    """The tensors that are weights themselves, no part of a product, each with the weight's name in the model."""
    places = {name: place_of(name) for name in read_header(path / WEIGHTS)}
    return {
        name: f"{place.module}.{'bias' if name.endswith('.bias') else 'weight'}"
        for name, place in places.items()
        if place.part in (None, _ROWS)
    }


def _rows_of(attached: Any, own: str) -> list[int]:
    """The tokens whose rows peft trains in the embedding `own`."""
    wrapper = attached.get_submodule(f"base_model.model.{own.removesuffix('.weight')}")
    rows: list[int] = wrapper.token_adapter.token_indices["default"]
    return rows


def _own_weight(base: Path, name: str) -> Any:
    """The base's weight `name` in FP32; of a tied head the embedding."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    if name not in found:
        name = next(each for each in found if each.endswith("embed_tokens.weight"))
    with safe_open(str(found[name]), framework="pt") as tensors:
        return tensors.get_tensor(name).float()
