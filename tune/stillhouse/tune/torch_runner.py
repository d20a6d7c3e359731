"""A transformers model behind the engine's runner: prefill into a slot, one-token decode over several.

So the base, the tuned model and every built version are asked by the same code, whatever computes the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class TorchRunner:
    """Slots of a causal model of transformers: what OrtRunner's `prefill` and `decode` promise, by torch.

    A slot is prefilled alone. At the first decode the slots' keys and values are laid side by side, right-padded; each
    step appends a column, and a row's mask names the columns that hold its positions.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.eval()
        self._device = next(model.parameters()).device
        # transformers 5 renames this argument on its way to 6.
        words = inspect.signature(model.forward).parameters
        self._cache_word = "cache" if "cache" in words else "past_key_values"
        self._alone: dict[int, Any] = {}
        self._together: Any = None
        self._places: Any = None  # (rows, columns): the position that a column holds, −1 for none

    def prefill(self, slot: int, tokens: Sequence[int], past: int, *, last_only: bool = False) -> Logits:
        """Runs `tokens` at positions past … of `slot`; logits (len(tokens), V) or, with `last_only`, (1, V)."""
        from transformers import DynamicCache

        self._together = None
        cache = _beginning(self._alone[slot], past) if past else DynamicCache()
        out = self._run(
            input_ids=self._tensor([list(tokens)]),
            position_ids=self._tensor([list(range(past, past + len(tokens)))]),
            cache=cache,
            logits_to_keep=1 if last_only else 0,
        )
        self._alone[slot] = cache
        return _array(out.logits[0])

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token a row: row r is slot r, which holds lengths[r] tokens already; logits (rows, V)."""
        if self._together is None or self._places.shape[0] != len(tokens):
            self._lay_together(len(tokens))
        at = self._tensor(list(lengths))[:, None]
        # What lies at this place already was a guess, or the same token of a row that is done.
        self._places[self._places >= at] = -1
        self._places = torch.cat([self._places, at], dim=1)
        out = self._run(
            input_ids=self._tensor(list(tokens))[:, None],
            position_ids=at,
            cache=self._together,
            attention_mask=(self._places >= 0)[:, None, None, :],
        )
        return _array(out.logits[:, 0])

    def _lay_together(self, rows: int) -> None:
        """One cache of the slots 0 … rows − 1, right-padded to the longest."""
        from transformers import DynamicCache

        caches = [self._alone[slot] for slot in range(rows)]
        lengths = [cache.get_seq_length() for cache in caches]
        longest = max(lengths)
        together = DynamicCache()
        for layer in range(len(caches[0].layers)):
            pairs = [(cache.layers[layer].keys, cache.layers[layer].values) for cache in caches]
            keys, values = (torch.cat([_padded(pair[kind], longest) for pair in pairs]) for kind in (0, 1))
            together.update(keys, values, layer)
        columns = torch.arange(longest, device=self._device)[None, :]
        self._together = together
        self._places = torch.where(columns < self._tensor(lengths)[:, None], columns, -1)

    def _run(self, *, cache: Any, **inputs: Any) -> Any:
        with torch.no_grad():
            return self._model(**inputs, **{self._cache_word: cache}, use_cache=True)

    def _tensor(self, values: list[Any]) -> Any:
        return torch.tensor(values, device=self._device)


def device() -> str:
    """Where models are run: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: Path) -> Any:
    """The checkpoint in `folder` in FP32, on this machine's device."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return model.to(device())


def _beginning(cache: Any, length: int) -> Any:
    """A cache of the first `length` tokens of `cache`."""
    from transformers import DynamicCache

    shorter = DynamicCache()
    for index, layer in enumerate(cache.layers):
        shorter.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
    return shorter


def _padded(tensor: Any, length: int) -> Any:
    """(1, heads, S, D) with zeros up to S = length."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[2]))


def _array(logits: Any) -> Logits:
    rows: Logits = logits.float().cpu().numpy()
    return rows
