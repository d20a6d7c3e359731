"""FP64 for a model whose FP32 cannot tell a wrong merge from rounding, with the memory of one layer more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def computing_in_fp64(model: Any) -> Iterator[None]:
    """Within it each layer of a transformers model, peft's on it included, is FP64 while it runs, and FP32 again after.

    An FP32 weight goes to FP64 and back without a change of a bit. Norms keep to FP32 inside, as transformers has them.
    """
    hooks = []
    for part in _parts(model):
        hooks.append(part.register_forward_pre_hook(_widen))
        hooks.append(part.register_forward_hook(_narrow))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _parts(model: Any) -> Iterator[Any]:
    """The embedding, each layer, the last norm, the head."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = causal.base_model  # the model itself, where it has no decoder of its own
    layers = getattr(decoder, "layers", None)
    yield from layers or ()
    yield from (child for child in decoder.children() if child is not layers)
    head = causal.get_output_embeddings()
    if decoder is not causal and head is not None:
        yield head


def _widen(part: Any, _: Any) -> None:
    part.double()


def _narrow(part: Any, _: Any, __: Any) -> None:
    part.float()
