"""Runs the graph: one ONNX Runtime session, its tensors bound to the slots of the KV cache (no copy of KV)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from stillhouse.engine.cuda_cache import DeviceSlotCache
from stillhouse.engine.errors import EngineError
from stillhouse.engine.kv_cache import SlotCache
from stillhouse.engine.manifest import LOGITS_FROM, ModelRecord
from stillhouse.engine.session import open_session
from stillhouse.engine.weights_cache import remembered

log = logging.getLogger(__name__)

Logits = NDArray[np.float32]
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


class OrtRunner:
    """A decoder graph of the model builder's form (GroupQueryAttention), on a CPU or a CUDA device.

    Not supported by GroupQueryAttention: several tokens a row, with a past, at batch > 1. So a prefill is one row
    (in chunks, if wanted), and a decode step is one token a row over the slots 0 … rows − 1.

    Rows that ONNX Runtime would compute otherwise than among others (`_needs_company`) decode beside one more that
    nobody reads, so that company changes no answer. In the cache's memory that spare row's slot lies before slot 0.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        network: ModelRecord,
        slots: int,
        max_len: int,
        threads: int | None = None,
        provider: str = "cpu",
    ) -> None:
        self._session = open_session(model_path, threads=threads, provider=provider)
        self.provider = str(self._session.get_providers()[0])
        self.threads = threads
        inputs = {node.name: node for node in self._session.get_inputs()}
        if missing := {"input_ids", "attention_mask", "past_key_values.0.key"} - set(inputs):
            raise EngineError(
                f"{model_path} is not a decoder graph of the model builder: it has no input {sorted(missing)[0]!r}",
                hint="build it with 'stillhouse build'",
            )
        self._takes_positions = "position_ids" in inputs
        # An input with a default (ONNX: an initializer that is an input too), which the build adds.
        self._skips_logits = LOGITS_FROM in {node.name for node in self._session.get_overridable_initializers()}
        self._vocab_size = network.vocab_size
        self._logits_dtype = next(_DTYPES[node.type] for node in self._session.get_outputs() if node.name == "logits")
        # Where slot 0 lies in the cache: behind the spare row, which a GPU has none of.
        self._first = 1 if provider == "cpu" else 0
        allocate = SlotCache if provider == "cpu" else DeviceSlotCache.allocate
        self.cache: SlotCache | DeviceSlotCache = allocate(
            layers=network.layers,
            slots=slots + self._first,
            kv_heads=network.kv_heads,
            max_len=max_len,
            head_dim=network.head_dim,
            dtype=_DTYPES[inputs["past_key_values.0.key"].type],
        )
        self._kv_names = [
            (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
            for layer in range(network.layers)
            for kind in ("key", "value")
        ]
        # A binding is kept by its first slot and rows: rebinding 4 × layers tensors costs more than the rest of a step.
        self._decode_bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._heads = network.heads
        self._most_threads = (threads or os.cpu_count() or 1) if provider == "cpu" else 0
        self._decode_logits = np.empty((slots + self._first, self._vocab_size), self._logits_dtype)
        self._lone_row_differs = provider == "cpu" and remembered(model_path, "lone_row_differs", self._lone_row_tried)
        if self._lone_row_differs:
            log.info("%s: this CPU computes a lone row by another kernel: it gets company", model_path.name)

    def prefill(self, slot: int, tokens: Sequence[int], past: int, *, last_only: bool = False) -> Logits:
        """Runs `tokens` at positions past … of `slot`; logits (len(tokens), vocab_size), float32.

        With `last_only` those of the last token alone, (1, vocab_size): the head is a fifth of a small model's work.
        """
        count = len(tokens)
        ids = np.asarray(tokens, np.int64).reshape(1, count)
        mask = np.ones((1, past + count), np.int64)
        positions = np.arange(past, past + count, dtype=np.int64).reshape(1, count)
        skip = np.asarray([count - 1 if last_only else 0], np.int64)
        computed = 1 if last_only and self._skips_logits else count
        logits = np.empty((1, computed, self._vocab_size), self._logits_dtype)
        binding = self._bind_cache(slot + self._first, rows=1)
        _bind_input(binding, "input_ids", ids)
        _bind_input(binding, "attention_mask", mask)
        if self._takes_positions:
            _bind_input(binding, "position_ids", positions)
        if self._skips_logits:
            _bind_input(binding, LOGITS_FROM, skip)
        _bind_output(binding, "logits", logits)
        self._session.run_with_iobinding(binding)
        wanted = logits[0, -1:] if last_only else logits[0]
        return wanted.astype(np.float32, copy=False)

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token a row: row r is slot r, which holds lengths[r] tokens already.

        Returns logits (rows, vocab_size), float32: a view that the next step overwrites.
        """
        if self._needs_company(lengths):
            return self._decode(0, [0, *tokens], [0, *lengths])[1:]
        return self._decode(self._first, tokens, lengths)

    def _needs_company(self, lengths: Sequence[int]) -> bool:
        """Whether rows of these lengths would be computed otherwise than among others, up to 0.8 logit apart.

        A lone row is, on some CPUs (4-bit MatMulNBits with AVX2). So are rows all of one length that have fewer heads
        together than there are threads: GroupQueryAttention divides their keys among these, and adds in another order.
        """
        if len(lengths) == 1 and self._lone_row_differs:
            return True
        return len(lengths) * self._heads < self._most_threads and min(lengths) == max(lengths)

    def _decode(self, first: int, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """`decode` over the cache's slots first … first + rows − 1."""
        rows = len(tokens)
        ids = np.asarray(tokens, np.int64).reshape(rows, 1)
        past = np.asarray(lengths, np.int64).reshape(rows, 1)
        # Right-padded, a row its own length: position p of a row counts when p <= past.
        mask = (np.arange(int(past.max()) + 1) <= past).astype(np.int64)
        binding = self._decode_bindings.get((first, rows))
        if binding is None:
            binding = self._decode_bindings[first, rows] = self._bind_cache(first, rows=rows)
            _bind_output(binding, "logits", self._decode_logits[:rows].reshape(rows, 1, self._vocab_size))
        _bind_input(binding, "input_ids", ids)
        _bind_input(binding, "attention_mask", mask)
        if self._takes_positions:
            _bind_input(binding, "position_ids", past)
        self._session.run_with_iobinding(binding)
        return self._decode_logits[:rows].astype(np.float32, copy=False)

    def _lone_row_tried(self) -> bool:
        """Whether this CPU's kernels compute a lone row otherwise than one of two: tried, since no table knows."""
        return any(map(self._differs_alone, (1, self._vocab_size // 2)))

    def _differs_alone(self, token: int) -> bool:
        alone = self._decode(0, [token], [1]).copy()
        differs = not np.array_equal(alone, self._decode(0, [token, token], [1, 1])[:1])
        self.cache.release(0)
        self.cache.release(1)
        return differs

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` of slot `source` into slot `target`."""
        self.cache.copy(source + self._first, target + self._first, tokens)

    def swap_out(self, slot: int, tokens: int) -> Any:
        """Takes the first `tokens` of `slot` out of the cache's memory; what comes back is for `swap_in`."""
        return self.cache.swap_out(slot + self._first, tokens)

    def swap_in(self, slot: int, swapped: Any) -> None:
        """Brings what was swapped out back into `slot`."""
        self.cache.swap_in(slot + self._first, swapped)

    def release(self, slot: int) -> None:
        """Forgets what `slot` holds and gives its memory back."""
        self.cache.release(slot + self._first)

    def _bind_cache(self, slot: int, *, rows: int) -> ort.IOBinding:
        """A binding whose past and present are the same memory: the cache's slots slot … slot + rows − 1."""
        binding = self._session.io_binding()
        cache, shape = self.cache, self.cache.shape(rows)
        for tensor, (past_name, present_name) in enumerate(self._kv_names):
            address = cache.address(tensor, slot)
            binding.bind_input(past_name, cache.device, 0, cache.dtype, shape, address)
            binding.bind_output(present_name, cache.device, 0, cache.dtype, shape, address)
        return binding


def _bind_input(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)


def _bind_output(binding: ort.IOBinding, name: str, array: NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
