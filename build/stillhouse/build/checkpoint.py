"""Base checkpoints: hashed, and refused by name before a weight is loaded (adapters: adapter.py)."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stillhouse.build.hub import folder_of
from stillhouse.build.prequantized import as_if_whole, quantization_of, refuse_unless_taken
from stillhouse.build.recipe import HUB_ID
from stillhouse.build.tensors import TensorInfo, read_header
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError

log = logging.getLogger(__name__)

# What the model builder writes and the engine runs with tests; a new family is one row here and a test.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Positions that the model builder computes as transformers does: its yarn rounds otherwise, and for a Llama it knows
# no other scaling than Llama 3's.
_ROPES = {"LlamaForCausalLM": ("default", "llama3")}
_OTHER_ROPES = ("default", "linear")

_READ = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
)  # fmt: skip
# What config.json must say, and the least that makes sense: a token is predicted from the one before it.
_NEEDED = {
    "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 1, "max_position_embeddings": 2,
}  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model's folder: what it is called, its config.json, its tensors' shapes, and a hash over all it says.

    `quantized`: it brings integers of its own, which int4 takes over; `tensors` are as if it did not.
    """

    id: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    sha256: str
    quantized: bool

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def context_length(self) -> int:
        return context_length_of(self.config)


def open_checkpoint(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """The base at `source`, a folder or a hub id; its own modelling code is refused unless `trust_remote_code`.

    Raises StillhouseError where it is no checkpoint, of a family that is not supported, quantized, pickled or broken,
    or holds an adapter, which transformers would attach unasked.
    """
    folder = folder_of(source, revision, "base", code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise StillhouseError(
            f"base: {folder} is no checkpoint: it has no config.json",
            hint="name the folder that holds config.json and *.safetensors, as save_pretrained writes it",
        )
    if (folder / "adapter_config.json").is_file():
        raise StillhouseError(
            f"base: {folder} holds an adapter (adapter_config.json) beside its config.json",
            hint="move adapter_config.json and its weights into a folder of their own, and name it in adapters",
        )
    config = read_json(folder / "config.json")
    architecture = _architecture(folder, config)
    if "auto_map" in config and not trust_remote_code:
        raise StillhouseError(
            f"base: {folder} brings its own modelling code (auto_map), which is not run",
            hint="read it, then say trust_remote_code = true in the recipe",
        )
    if architecture not in ARCHITECTURES:
        raise StillhouseError(
            f"base: {folder} is a {architecture}, which is not supported",
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    if "auto_map" not in config and config.get("model_type") != architecture.removesuffix("ForCausalLM").lower():
        raise StillhouseError(  # transformers goes by the one, all else by the other
            f"base: {folder}/config.json says both {architecture} and model_type {config.get('model_type')!r}",
            hint="copy or download the checkpoint again",
        )
    tensors = _all_tensors(folder)
    if (quantization := quantization_of(folder, config, tensors)) is not None:
        refuse_unless_taken(folder, quantization)
        tensors = as_if_whole(tensors)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise StillhouseError(
            f"base: {folder} has no tokenizer", hint="save it beside the weights: tokenizer.save_pretrained(folder)"
        )
    for name in _READ:
        if (folder / name).is_file():
            read_json(folder / name)
    _hold_against_config(folder, config, tensors)
    _refuse_odd_tokens(folder)
    named = str(config.get("_name_or_path") or "")
    own_name = source if HUB_ID.fullmatch(source) else named if HUB_ID.fullmatch(named) else folder.name
    return Checkpoint(own_name, folder, config, tensors, _folder_sha256(folder), quantization is not None)


def context_length_of(config: dict[str, Any]) -> int:
    """The longest context in which a token sees all before it: the export knows no sliding window, as Mistral has."""
    longest = int(config["max_position_embeddings"])
    slides = config["architectures"] == ["MistralForCausalLM"]
    return min(longest, int(config.get("sliding_window") or longest)) if slides else longest


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises StillhouseError, with the line, where it is not JSON."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StillhouseError(f"{file} is not JSON: {error}", hint="copy or download the file again") from None
    if not isinstance(content, dict):
        raise StillhouseError(f"{file} holds no JSON object", hint="copy or download the file again")
    return content


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures") or ["none"]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise StillhouseError(
            f"base: {folder}/config.json has architectures {named!r}, no list of names",
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    return named[0]


def _all_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, from one file or from the shards that its index names."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and single.is_file():
        raise StillhouseError(
            f"base: {folder} has both {single.name} and {index.name}: two checkpoints in one folder",
            hint="remove the one that is not meant",
        )
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise StillhouseError(f"base: {file} is missing, but {index.name} names it", hint="download it again")
    if not files:
        if pickled := pickle_in("base", folder):
            raise pickled
        raise StillhouseError(
            f"base: {folder} has no *.safetensors", hint="name the folder that holds the model's weights"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise StillhouseError(f"{index} names no weights", hint="copy or download the file again")
    if outside := sorted(name for name in found.values() if Path(name).name != name):
        raise StillhouseError(f"{index} names {outside[0]}, no file beside it", hint="copy the weights into its folder")
    return found


def _hold_against_config(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
    """config.json must say what the weights are: a layer too many or too few would be dropped or made up silently."""
    for key, least in _NEEDED.items():
        value = config.get(key)
        if type(value) is not int or value < least:
            said = "no" if value is None else f"{value!r} as"
            raise StillhouseError(
                f"base: {folder}/config.json says {said} {key}; it is a whole number, {least} at least",
                hint="copy or download the checkpoint again",
            )
    rope, known = _rope_type(config), _ROPES.get(config["architectures"][0], _OTHER_ROPES)
    if rope not in known:
        raise StillhouseError(
            f"base: {folder} scales its positions by {rope} (rope_scaling, rope_parameters), which is not supported "
            f"for a {config['architectures'][0]}",
            hint=f"supported: {', '.join(known)}; a longer context may be left out of its config.json",
        )
    if config.get("use_sliding_window"):
        raise StillhouseError(
            f"base: {folder} attends through a sliding window (use_sliding_window), which is not supported",
            hint="use_sliding_window = false in its config.json, where prompts stay within the window",
        )
    if (context := context_length_of(config)) < config["max_position_embeddings"]:
        log.warning("warning: %s has a sliding window: its context is built as that window, %d tokens", folder, context)
    if (
        odd := next((n for n, info in tensors.items() if n.endswith(".weight") and not info.is_whole_float), None)
    ) is not None:
        raise StillhouseError(
            f"base: {folder} has {odd} in {tensors[odd].dtype}, not in floats of 16 bits or more",
            hint="copy or download the checkpoint again",
        )
    layers = {int(found.group(1)) for name in tensors if (found := _LAYER.search(name))}
    if layers != set(range(config["num_hidden_layers"])):
        raise StillhouseError(
            f"base: {folder} has weights of {len(layers)} layers, its config.json says {config['num_hidden_layers']}",
            hint="copy or download the checkpoint again",
        )
    embedding = next((info.shape for name, info in tensors.items() if name.endswith("embed_tokens.weight")), None)
    expected = (config["vocab_size"], config["hidden_size"])
    if embedding != expected:
        raise StillhouseError(
            f"base: {folder} has {'an embedding ' + str(list(embedding)) if embedding else 'no embedding'}, "
            f"its config.json says {list(expected)} (vocab_size, hidden_size)",
            hint="copy or download the checkpoint again",
        )


def _refuse_odd_tokens(folder: Path) -> None:
    """Where a generation begins and ends must be said in token ids."""
    for name in ("config.json", "generation_config.json"):
        said = read_json(folder / name) if (folder / name).is_file() else {}
        for key in ("bos_token_id", "eos_token_id"):
            ids = said.get(key)
            single = ids if isinstance(ids, list) and key == "eos_token_id" else [] if ids is None else [ids]
            if not all(type(token) is int and token >= 0 for token in single):
                raise StillhouseError(
                    f"base: {folder}/{name} has {ids!r} as {key}, no token id", hint="copy or download the file again"
                )


def _rope_type(config: dict[str, Any]) -> str:
    """How the base scales its positions, under the keys of today and of before."""
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(settings := config.get(key), dict):
            return str(settings.get("rope_type") or settings.get("type") or "default")
    return "default"


def pickle_in(role: str, folder: Path) -> StillhouseError | None:
    """The refusal of the first pickle in `folder`, or None where it has none."""
    file = next(iter(sorted(file for kind in ("bin", "pt", "pth") for file in folder.glob(f"*.{kind}"))), None)
    if file is None:
        return None
    return StillhouseError(
        f"{role}: {file} is a pickle, which can run code when it is read",
        hint="save it as safetensors: save_pretrained(folder, safe_serialization=True)",
    )


def meaningful_files(folder: Path) -> list[Path]:
    """The files of `folder` that say what the model is."""
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "*.py")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _folder_sha256(folder: Path) -> str:
    return sha256_over((file.name, sha256_of(file)) for file in meaningful_files(folder))


def sha256_over(pairs: Iterable[tuple[str, str]]) -> str:
    """The sha256 over names and hashes."""
    digest = hashlib.sha256()
    for name, sha256 in pairs:
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()
