"""Embedding and head in a merge: new tokens, and one weight that becomes two. Runs in the merge's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.build.adapter import WEIGHTS, is_vocabulary, place_of
from stillhouse.build.tensors import read_header
from stillhouse.engine.errors import StillhouseError


def untie(model: Any) -> None:
    """Gives a LoRA on tied embeddings a weight of its own to be merged into: the other end has not its delta."""
    import torch
    from peft.tuners.lora import LoraLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if not any(isinstance(end, LoraLayer) for end in ends):
        return
    weights = [_own_module(end) for end in ends]
    if weights[0].weight is weights[1].weight:
        weights[1].weight = torch.nn.Parameter(weights[1].weight.detach().clone(), requires_grad=False)


def _own_module(module: Any) -> Any:
    """The module that peft has wrapped, or `module` itself."""
    for name in ("base_layer", "original_module"):
        module = getattr(module, name, module)
    return module


def tie_as_it_is(model: Any) -> None:
    """Makes the config of what was tied before say whether embedding and head are one weight still.

    A change of both that peft kept tied (ensure_weight_tying) is merged once a way, and differs by FP32's rounding.
    """
    import torch

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rounding = 4 * torch.finfo(torch.float32).eps * float(embedding.weight.abs().max())
    tied = torch.allclose(embedding.weight, head.weight, rtol=0.0, atol=rounding)
    if tied:
        head.weight = embedding.weight
    model.config.tie_word_embeddings = tied  # peft's merge may have said no


def grow_vocabulary(model: Any, path: Path, weight: float, base_rows: int) -> None:
    """An adapter that brings new tokens carries whole embeddings; the model gets as many rows before it is attached."""
    header = read_header(path / WEIGHTS)
    found = [info.shape[0] for name, info in header.items() if is_vocabulary(place_of(name))]
    now = model.get_input_embeddings().weight.shape[0]
    if not found or found[0] == now:
        return
    if now != base_rows:
        raise StillhouseError(
            f"adapter: {path} has embeddings of {found[0]} tokens, an adapter before it has {now}",
            hint="adapters that bring new tokens must bring the same ones",
        )
    if weight != 1.0:
        raise StillhouseError(
            f"adapter: {path} brings new tokens, which have no part to be weighted by {weight:g}",
            hint="leave its weight out",
        )
    model.resize_token_embeddings(found[0], mean_resizing=False)


def refuse_tokens_without_rows(folder: Path, adapters: list[Path], rows: int) -> None:
    """A token that an adapter's tokenizer brings must have an embedding."""
    from tokenizers import Tokenizer

    if not any((path / "tokenizer.json").is_file() for path in adapters):
        return
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    token, last = max(vocabulary.items(), key=lambda entry: entry[1])
    if last >= rows:
        raise StillhouseError(
            f"the adapter's tokenizer has {token!r} as token {last}, but the embedding has {rows} rows",
            hint="save the adapter with its embeddings: modules_to_save, or save_embedding_layers=True",
        )
