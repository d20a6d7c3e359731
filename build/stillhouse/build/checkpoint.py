"""Base checkpoints and adapters: found, hashed, and refused by name before a weight is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stillhouse.build.recipe import HUB_ID, AdapterRef
from stillhouse.build.tensors import TensorInfo, read_header
from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError

# What the model builder writes and the engine runs with tests; a new family is one row here and a test.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_DOWNLOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
_ROOT = "base_model.model."
_LORA = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A base model's folder: what it is called, its config.json, its tensors' shapes, and a hash over all it says."""

    id: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    sha256: str

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def context_length(self) -> int:
        return int(self.config["max_position_embeddings"])


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter's folder, with its adapter_config.json and the factor of its change."""

    id: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    sha256: str
    weight: float


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """The base at `source`, a folder or a hub id.

    Raises StillhouseError where it is no checkpoint, of a family that is not supported, quantized, pickled or broken.
    """
    folder = _folder(source, revision, "base")
    if not (folder / "config.json").is_file():
        raise StillhouseError(
            f"base: {folder} is no checkpoint: it has no config.json",
            hint="name the folder that holds config.json and *.safetensors, as save_pretrained writes it",
        )
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    if "auto_map" in config:
        raise StillhouseError(
            f"base: {folder} brings its own modelling code (auto_map), which is never run",
            hint=f"supported architectures: {', '.join(ARCHITECTURES)}",
        )
    if architecture not in ARCHITECTURES:
        raise StillhouseError(
            f"base: {folder} is a {architecture}, which is not supported",
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise StillhouseError(
            f"base: {folder} is quantized already ({method})",
            hint="name the unquantized checkpoint; the build quantizes it itself",
        )
    tensors = _all_tensors(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise StillhouseError(
            f"base: {folder} has no tokenizer", hint="save it beside the weights: tokenizer.save_pretrained(folder)"
        )
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    named = str(config.get("_name_or_path") or "")
    own_name = source if HUB_ID.fullmatch(source) else named if HUB_ID.fullmatch(named) else folder.name
    return Checkpoint(own_name, folder, config, tensors, _folder_sha256(folder))


def open_adapter(ref: AdapterRef, base: Checkpoint) -> Adapter:
    """The adapter `ref` names, held against `base`.

    Raises StillhouseError where it is missing, no LoRA, pickled, broken, or changes what `base` does not have.
    """
    folder = _folder(ref.path, None, "adapter")
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        raise StillhouseError(
            f"adapter: {folder} is no adapter: it has no adapter_config.json",
            hint="name the folder that peft's save_pretrained wrote",
        )
    config = read_json(config_file)
    if config.get("peft_type") != "LORA":
        raise StillhouseError(
            f"adapter: {folder} is of type {config.get('peft_type')}; only LORA can be merged",
            hint="train a LoRA (rsLoRA and DoRA are LORA too), or merge this one yourself and name the result as base",
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])), None)
        if pickled is not None:
            raise _pickle("adapter", pickled)
        raise StillhouseError(
            f"adapter: {folder} has no adapter_model.safetensors", hint="save it again with save_pretrained"
        )
    tensors = read_header(weights)
    _hold_against(folder, tensors, base)
    digest = _sha256_over((file.name, sha256_of(file)) for file in _meaningful(folder))
    own_name = ref.path if HUB_ID.fullmatch(ref.path) else folder.name
    return Adapter(own_name, folder, config, tensors, digest, ref.weight)


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`. Raises StillhouseError, with the line, where it is not JSON."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StillhouseError(f"{file} is not JSON: {error}", hint="copy or download the file again") from None
    if not isinstance(content, dict):
        raise StillhouseError(f"{file} holds no JSON object", hint="copy or download the file again")
    return content


def _folder(source: str, revision: str | None, role: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if Path(source).exists():
        raise StillhouseError(f"{role}: {source} is a file, not a folder", hint="name the folder that holds it")
    if Path(source).is_absolute():
        raise StillhouseError(
            f"{role}: no such folder: {source}",
            hint="paths in a recipe are relative to the recipe; a hub id looks like owner/name",
        )
    return _download(source, revision, role)


def _download(source: str, revision: str | None, role: str) -> Path:
    """The hub's snapshot of `source`, from the local hub cache where it is there (HF_TOKEN and HF_ENDPOINT hold)."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=_DOWNLOADED))
    except errors.GatedRepoError:
        raise StillhouseError(
            f"{role}: {source} is gated", hint="accept its terms on the hub, then set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise StillhouseError(f"{role}: {source} has no revision {revision!r}", hint="see its commits") from None
    except errors.RepositoryNotFoundError:
        raise StillhouseError(
            f"{role}: {source} is neither a folder nor on the hub",
            hint="check the spelling; private ones need HF_TOKEN",
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise StillhouseError(
            f"{role}: {source} is not a folder, and the hub cannot be reached: {first_line}",
            hint="name a local folder, or check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ) from None


def _all_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint, from one file or from the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise StillhouseError(f"base: {file} is missing, but {index.name} names it", hint="download it again")
    if not files:
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])), None)
        if pickled is not None:
            raise _pickle("base", pickled)
        raise StillhouseError(
            f"base: {folder} has no *.safetensors", hint="name the folder that holds the model's weights"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def _hold_against(folder: Path, tensors: dict[str, TensorInfo], base: Checkpoint) -> None:
    """Every tensor of the adapter must belong to a module of the base, and fit it."""
    shapes = {name.removesuffix(".weight"): info.shape for name, info in base.tensors.items()}
    embedding = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens")), None)
    if embedding is not None and base.config.get("tie_word_embeddings"):
        shapes.setdefault("lm_head", embedding)
    if not tensors:
        raise StillhouseError(f"adapter: {folder} holds no tensor", hint="save the trained adapter again")
    for name, info in tensors.items():
        inner = name.removeprefix(_ROOT)
        part = _LORA.search(inner)
        module = inner[: part.start()] if part else inner.removesuffix(".weight").removesuffix(".bias")
        if not name.startswith(_ROOT) or module not in shapes:
            raise StillhouseError(
                f"adapter: {folder} changes {module}, a module that this base does not have",
                hint=f"the base has: {', '.join(_kinds(shapes))}; was it trained on another base than {base.id}?",
            )
        if part and not _fits(part.group(1), info.shape, shapes[module]):
            raise StillhouseError(
                f"adapter: {folder} does not fit: {name} is {list(info.shape)}, "
                f"the base's {module} is {list(shapes[module])} (out, in)",
                hint=f"it was trained on a model of another size than {base.id}",
            )


def _fits(part: str, shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if len(weight) != 2:
        return False
    rows, columns = weight
    expected = {
        "lora_A": (len(shape) == 2 and shape[1] == columns),
        "lora_B": (len(shape) == 2 and shape[0] == rows),
        "lora_embedding_A": (len(shape) == 2 and shape[1] == rows),
        "lora_embedding_B": (len(shape) == 2 and shape[0] == columns),
        "lora_magnitude_vector": (shape[0] == rows),
    }
    return expected[part]


def _kinds(modules: Iterable[str]) -> list[str]:
    """The last words of the modules' names, each once: q_proj, k_proj, …"""
    return sorted({module.rpartition(".")[2] for module in modules})


def _pickle(role: str, file: Path) -> StillhouseError:
    return StillhouseError(
        f"{role}: {file} is a pickle, which can run code when it is read",
        hint="save it as safetensors: save_pretrained(folder, safe_serialization=True)",
    )


def _meaningful(folder: Path) -> list[Path]:
    patterns = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _folder_sha256(folder: Path) -> str:
    return _sha256_over((file.name, sha256_of(file)) for file in _meaningful(folder))


def _sha256_over(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for name, sha256 in pairs:
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()
