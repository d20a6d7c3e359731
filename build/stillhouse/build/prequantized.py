"""Bases that auto-gptq or gptqmodel quantized already: their integers are taken over as they are.

A linear (N, K) lies as qweight (K/8, N) int32, eight inputs in a word; qzeros (G, N/8) int32, eight outputs in a word;
scales (G, N) half. A stored zero point is one less than the zero, unless the format is gptq_v2.
(https://github.com/AutoGPTQ/AutoGPTQ, qlinear_cuda_old.py; https://github.com/ModelCloud/GPTQModel, base.py)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.build.blocks import BlockWeight, stack
from stillhouse.build.tensors import TensorInfo
from stillhouse.build.worker import Share
from stillhouse.engine.errors import StillhouseError

GROUP_SIZES = (16, 32, 64, 128, 256)
TAKEN = "integers.safetensors"
_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


def quantization_of(folder: Path, config: dict[str, Any], tensors: Iterable[str]) -> dict[str, Any] | None:
    """How the checkpoint in `folder` with these tensors is quantized, None where it is not.

    config.json says so, or a quantize_config.json beside it, as auto-gptq wrote before transformers read checkpoints.
    """
    settings = config.get("quantization_config")
    file = folder / "quantize_config.json"
    if settings is None and file.is_file() and any(name.endswith(".qweight") for name in tensors):
        try:
            settings = {"quant_method": "gptq"} | json.loads(file.read_text("utf-8"))
        except (ValueError, TypeError, RecursionError) as error:
            raise StillhouseError(
                f"{file} is no JSON object: {error}", hint="copy or download the file again"
            ) from None
    if settings is not None and not isinstance(settings, dict):
        raise StillhouseError(
            f"base: {folder}/config.json has {settings!r} as quantization_config, which is no object",
            hint="copy or download the checkpoint again",
        )
    return settings


def refuse_unless_taken(folder: Path, quantization: dict[str, Any]) -> None:
    """Raises StillhouseError, with the reason, for a quantized checkpoint whose integers cannot be taken over."""
    method = str(quantization.get("quant_method", "unknown"))
    reason = None
    if method not in ("gptq", "gptqmodel"):
        reason = f"is quantized by {method}"
    elif quantization.get("bits") != 4:
        reason = f"is quantized to {quantization.get('bits')} bits"
    elif quantization.get("group_size") not in GROUP_SIZES:
        reason = f"is quantized in groups of {quantization.get('group_size')}"
    elif quantization.get("desc_act"):
        reason = "is quantized with desc_act, which scatters a group's inputs over the row"
    elif format_of(quantization) not in ("gptq", "gptq_v2"):
        reason = f"is quantized in the format {format_of(quantization)}"
    elif quantization.get("dynamic"):
        reason = "is quantized module by module in different ways (dynamic)"
    elif quantization.get("pack_dtype", "int32") != "int32":
        reason = f"has its integers packed into {quantization['pack_dtype']}"
    if reason is not None:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise StillhouseError(
            f"base: {folder} {reason}; its integers cannot be taken over",
            hint=f"name the unquantized checkpoint, or one by gptq at 4 bits in groups of {sizes} without desc_act",
        )


def format_of(quantization: dict[str, Any]) -> str:
    """The layout's name; gptqmodel writes it under one key, under the other, or (auto-gptq) under none."""
    if quantization.get("is_marlin_format"):  # auto-gptq's key before there was one for the format
        return "marlin"
    return str(quantization.get("checkpoint_format") or quantization.get("format") or "gptq")


def as_if_whole(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with a weight (N, K) in place of each quantized linear's parts.

    Raises StillhouseError where a part is missing, or integers do not lie in words of 32 bits.
    """
    whole = {name: info for name, info in tensors.items() if not name.endswith(_PARTS)}
    for name, info in tensors.items():
        if name.endswith(".qweight"):
            for part in (".qzeros", ".scales"):
                if (lacking := name.removesuffix(".qweight") + part) not in tensors:
                    raise StillhouseError(f"base: {lacking} is missing", hint="copy or download the checkpoint again")
            if info.dtype != "I32" or len(info.shape) != 2:
                raise StillhouseError(
                    f"base: {name} is {info.dtype} {list(info.shape)}, not (inputs / 8, outputs) in I32",
                    hint="name the unquantized checkpoint",
                )
            words, rows = info.shape
            whole[f"{name.removesuffix('.qweight')}.weight"] = TensorInfo("F32", (rows, words * 8), info.file)
    return whole


def unpack(share: Share, *, base: str, destination: str) -> dict[str, Any]:
    """Writes `base` as an FP32 checkpoint with its own integers beside it (TAKEN); returns an empty merge record.

    Raises StillhouseError where a linear's groups are not neighbours, a tensor has no place in the architecture or does
    not fit it, or a weight is NaN or inf.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from stillhouse.build.proof import refuse_not_finite  # these two read checkpoints, as they do this file
    from stillhouse.build.tokenizer_files import write_tokenizer

    folder, source = Path(destination), Path(base)
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    tensors = _tensors(source)
    settings = quantization_of(source, config.to_dict(), tensors)
    if settings is None:
        raise StillhouseError(f"base: {base} is not quantized", hint="name an unquantized checkpoint as one")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state: dict[str, torch.Tensor] = {}
    integers: dict[str, torch.Tensor] = {}
    modules = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    for index, module in enumerate(modules):
        parts = {part: tensors.pop(module + part) for part in _PARTS if module + part in tensors}
        weight = block_weight(module, parts, settings)
        state[f"{module}.weight"] = torch.from_numpy(weight.dequantized())
        for part in ("integers", "scales", "zeros"):
            integers[f"{module}.{part}"] = torch.from_numpy(np.ascontiguousarray(getattr(weight, part)))
        share(0.6 * (index + 1) / len(modules))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    known = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # auto-gptq writes biases of zeros where the architecture has none
    state |= {name: tensor.float() for name, tensor in tensors.items() if name in known or tensor.count_nonzero()}
    for name, tensor in state.items():
        if name not in known:
            raise StillhouseError(f"base: {base}: {name} has no place in a {config.architectures[0]}")
        if tensor.shape != known[name]:
            raise StillhouseError(
                f"base: {base} has {name} as {list(tensor.shape)}, its config.json makes it {list(known[name])}",
                hint="copy or download the checkpoint again",
            )
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    if lacking := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise StillhouseError(f"base: {base} lacks {lacking[0]}", hint="copy or download the checkpoint again")
    refuse_not_finite(model, f"base: {base}")
    model.config.dtype = torch.float32
    model.save_pretrained(folder, max_shard_size="1GB")
    if (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    # The width is data, so that the file says all that a reader needs.
    integers["block_size"] = torch.tensor([int(settings["group_size"])])
    save_file(integers, str(folder / TAKEN))
    write_tokenizer(source, [], folder)
    share(1.0)
    return {"modules_changed": []}


def block_weight(module: str, parts: dict[str, Any], settings: dict[str, Any]) -> BlockWeight:
    """One linear's parts as a BlockWeight with the same integers. Raises StillhouseError where groups are scattered."""
    group = int(settings["group_size"])
    integers = _words(parts[".qweight"].numpy()).transpose(1, 0, 2).reshape(parts[".qweight"].shape[1], -1)
    stored = _words(parts[".qzeros"].numpy()).reshape(len(parts[".qzeros"]), -1)
    if ".g_idx" in parts and not np.array_equal(parts[".g_idx"].numpy(), np.arange(integers.shape[1]) // group):
        raise StillhouseError(
            f"base: {module} has its inputs' groups scattered (g_idx); they cannot be taken over",
            hint="quantize it without desc_act, or name the unquantized checkpoint",
        )
    offset = 0 if format_of(settings) == "gptq_v2" else 1
    zeros = ((stored + offset) & 15).T[: len(integers)]
    scales = parts[".scales"].numpy().astype(np.float16).T
    return BlockWeight(integers, np.ascontiguousarray(scales), np.ascontiguousarray(zeros), 4, group)


def taken(checkpoint: Path, nodes: list[str]) -> dict[str, BlockWeight]:
    """The integers that a base brought, by the graph's node; empty where it brought none.

    Raises StillhouseError where it brought some of a fused node's modules only.
    """
    from safetensors.numpy import load_file

    from stillhouse.build.stream import modules_of

    if not (checkpoint / TAKEN).is_file():
        return {}
    tensors = load_file(str(checkpoint / TAKEN))
    block_size = int(tensors.pop("block_size")[0])
    found = {}
    for node in nodes:
        modules = modules_of(node)
        there = [module for module in modules if f"{module}.integers" in tensors]
        if there and len(there) < len(modules):
            lacking = next(module for module in modules if module not in there)
            raise StillhouseError(
                f"base: {there[0]} is quantized, {lacking} is not, but {node} holds both",
                hint="quantize all of them or none, or name the unquantized checkpoint",
            )
        if there:
            found[node] = stack([_block_weight(tensors, module, block_size) for module in modules])
    return found


def _block_weight(tensors: dict[str, NDArray[Any]], module: str, block_size: int) -> BlockWeight:
    integers, scales, zeros = (tensors[f"{module}.{part}"] for part in ("integers", "scales", "zeros"))
    return BlockWeight(integers, scales, zeros, 4, block_size)


def _words(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The eight 4-bit integers of each word, lowest first: (…, 8)."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    unpacked: NDArray[np.uint8] = ((packed.view(np.uint32)[..., None] >> shifts) & 15).astype(np.uint8)
    return unpacked


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
