"""LoRA adapters: found, hashed, held against their base, and refused by name before a weight is loaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stillhouse.build.checkpoint import Checkpoint, meaningful_files, pickle_in, read_json, sha256_over
from stillhouse.build.hub import folder_of
from stillhouse.build.recipe import HUB_ID, AdapterRef
from stillhouse.build.tensors import TensorInfo, read_header
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError, shown

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_VOCABULARY = ("embed_tokens", "lm_head")
_LORA = re.compile(
    r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta)(\.weight|\.bias)?$"
)
# What cannot be a merge into one base, by the key of adapter_config.json that asks for it.
_UNMERGEABLE = {
    "alora_invocation_tokens": "acts only behind its invocation tokens (aLoRA)",
    "arrow_config": "is a router over other adapters (Arrow)",
    "layer_replication": "stacks the base's layers anew",
}
# Starts that change the base by chance, by data or by another library, none of which the file holds.
_LOST_STARTS = re.compile(r"pissa_niter_.*|corda.*|lora_ga|loftq")
# Where peft wraps a module, the module's own weights lie one name deeper.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save|token_adapter)(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter's folder, with its adapter_config.json and the factor of its change."""

    id: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    sha256: str
    weight: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of an adapter belongs: the base's module, and the part of a LoRA, or None for a whole weight."""

    module: str
    part: str | None


def open_adapter(ref: AdapterRef, base: Checkpoint) -> Adapter:
    """The adapter `ref` names, held against `base`; warns where only the base's name is another.

    Raises StillhouseError where it is missing, no LoRA, pickled, broken, or changes what `base` does not have.
    """
    folder = folder_of(ref.path, ref.revision, "adapter")
    if not (folder / "adapter_config.json").is_file():
        raise StillhouseError(
            f"adapter: {folder} is no adapter: it has no adapter_config.json",
            hint="name the folder that peft's save_pretrained wrote",
        )
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise StillhouseError(
            f"adapter: {folder} is of type {config.get('peft_type')}; only LORA can be merged",
            hint="train a LoRA (rsLoRA and DoRA are LORA too), or merge this one yourself and name the result as base",
        )
    _refuse_unmergeable(folder, config)
    if not (folder / WEIGHTS).is_file():
        if pickled := pickle_in("adapter", folder):
            raise pickled
        raise StillhouseError(f"adapter: {folder} has no {WEIGHTS}", hint="save it again with save_pretrained")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    tensors = read_header(folder / WEIGHTS)
    _hold_against(folder, tensors, base, config)
    digest = sha256_over((file.name, sha256_of(file)) for file in meaningful_files(folder))
    own_name = ref.path if HUB_ID.fullmatch(ref.path) else folder.name
    if other := _other_base(config, base):
        log.warning(
            "warning: adapter %s names %s as its base, this is %s; all shapes fit, so it is merged",
            own_name,
            other,
            base.id,
        )
    return Adapter(own_name, folder, config, tensors, digest, ref.weight)


def unknown_words(path: Path) -> list[str]:
    """What the adapter's config says and the installed peft does not know, as "key = value"; runs in the merge."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    config = read_json(path / "adapter_config.json")
    return [f"{key} = {shown(value)}" for key, value in sorted(config.items()) if value and key not in known]


def _refuse_unmergeable(folder: Path, config: dict[str, Any]) -> None:
    """A LoRA whose change is not one of the base's own weights, or not to be had from its file."""
    for key, what in _UNMERGEABLE.items():
        if config.get(key):
            raise StillhouseError(
                f"adapter: {folder} {what}: {key} in its adapter_config.json; it cannot be merged",
                hint="train a plain LoRA, or merge this one yourself and name the result as base",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _LOST_STARTS.fullmatch(start.lower()):
        raise StillhouseError(
            f"adapter: {folder} was begun by {start}, which changes the base in a way that the file does not hold",
            hint="save it as a plain LoRA: save_pretrained(folder, path_initial_model_for_weight_conversion=…)",
        )


def place_of(name: str) -> Place:
    """The place of the tensor `name`; the module is "" where the name is none that peft writes."""
    if not name.startswith(_ROOT):
        return Place("", None)
    inner = name.removeprefix(_ROOT)
    part = _LORA.search(inner)
    module = inner[: part.start()] if part else inner.removesuffix(".weight").removesuffix(".bias")
    return Place(_WRAPPED.sub("", module), part.group(1) if part else None)


def is_vocabulary(place: Place) -> bool:
    """Whether this is a whole embedding or head, whose rows are the vocabulary."""
    return place.part is None and place.module.endswith(_VOCABULARY)


def _hold_against(folder: Path, tensors: dict[str, TensorInfo], base: Checkpoint, config: dict[str, Any]) -> None:
    """Every tensor of the adapter must belong to a module of the base, and fit it."""
    shapes = {name.removesuffix(".weight"): info.shape for name, info in base.tensors.items()}
    embedding = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens")), None)
    if embedding is not None and base.config.get("tie_word_embeddings"):
        shapes.setdefault("lm_head", embedding)
    if not tensors:
        raise StillhouseError(f"adapter: {folder} holds no tensor", hint="save the trained adapter again")
    named = _other_base(config, base)
    question = f"it names {named} as its base, this is {base.id}" if named else f"was it trained on {base.id}?"
    places = {name: place_of(name) for name in tensors}
    rows = {tensors[name].shape[0] for name, place in places.items() if is_vocabulary(place) and tensors[name].shape}
    for name, place in places.items():
        found, wanted = tensors[name].shape, shapes.get(place.module)
        if not tensors[name].is_float:
            raise StillhouseError(
                f"adapter: {folder} has {name} in {tensors[name].dtype}, not in floats",
                hint="save the trained adapter again with save_pretrained",
            )
        if wanted is None:
            raise StillhouseError(
                f"adapter: {folder} changes {place.module or name}, a module that this base does not have",
                hint=f"the base has: {', '.join(_kinds(shapes))}; {question}",
            )
        if name.endswith(".bias") and place.part is None:
            wanted = (
                base.tensors[f"{place.module}.bias"].shape if f"{place.module}.bias" in base.tensors else wanted[:1]
            )
        if place.module.endswith(_VOCABULARY) and len(rows) == 1:
            wanted = (*rows, *wanted[1:])  # an adapter that brings new tokens has embeddings of as many rows
        if not _fits(place.part, name, found, wanted):
            raise StillhouseError(
                f"adapter: {folder} does not fit: {name} is {list(found)}, "
                f"the base's {place.module} is {list(wanted)} (out, in)",
                hint=f"it was trained on a model of another size; {question}",
            )
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other != name and (other not in tensors or tensors[other].shape[-1:] != found[:1]):
            what = f"is {list(tensors[other].shape)}" if other in tensors else "is missing"
            raise StillhouseError(
                f"adapter: {folder} does not fit itself: {name} is {list(found)}, {other} {what}",
                hint="save the trained adapter again with save_pretrained",
            )


def _fits(part: str | None, name: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a tensor of `shape` can belong to a module whose weight is `weight` (out, in)."""
    if part is None:
        return shape == weight
    if len(weight) != 2:
        return False
    rows, columns = weight
    if name.endswith(".bias"):
        return shape == (rows,)
    two = len(shape) == 2
    return {
        "lora_A": two and shape[1] == columns,
        "lora_B": two and shape[0] == rows,
        "lora_embedding_A": two and shape[1] == rows,
        "lora_embedding_B": two and shape[0] == columns,
        "lora_magnitude_vector": bool({rows, columns} & set(shape)),
        "trainable_tokens_delta": two and shape[1] == columns,
    }[part]


def _other_base(config: dict[str, Any], base: Checkpoint) -> str | None:
    """The base that the adapter names, where it is not this one by id or by folder."""
    named = str(config.get("base_model_name_or_path") or "")
    own = {_last(base.id), _last(str(base.path)), _last(str(base.config.get("_name_or_path") or ""))}
    return named if named and _last(named) not in own else None


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _kinds(modules: Iterable[str]) -> list[str]:
    """The last words of the modules' names, each once: q_proj, k_proj, …"""
    return sorted({module.rpartition(".")[2] for module in modules if not module.endswith(".bias")})
