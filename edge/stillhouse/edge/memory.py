"""What a model needs of the device's memory, and what can be served within a limit; known before anything is loaded.

Memory is unified on a Jetson: what the GPU takes, the CPU lacks. So MemAvailable bounds every limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillhouse.engine.errors import StillhouseError, UsageError
from stillhouse.engine.limits import DEFAULT_MODEL_LEN_TOKENS
from stillhouse.engine.manifest import Manifest
from stillhouse.engine.options import EngineOptions

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
# Measured: Python with ONNX Runtime, the gateway and a tokenizer take 130 to 190 MB; sessions some for each weight.
PROCESS_BYTES = 200 * 10**6
WEIGHTS_FACTOR = 1.1
# An answer shorter than this is of no use to anybody.
LEAST_CONTEXT_TOKENS = 256


class TooLittleMemory(StillhouseError):
    """The device has not enough memory available now; it may have when something else has ended."""


def parse_size(text: str) -> int:
    """Bytes of "2GB", "1.5 GiB", "800M" or "1073741824": K, M, G and T are thousands, Ki, Mi, Gi and Ti are 1024s.

    Raises UsageError for what is no size, or none above zero.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?|\.\d+)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE | re.ASCII)
    unit = found[2].lower() if found else ""
    if found is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is not a size of memory", hint="write it like 2GB, 1500M or 1.5GiB")
    size = int(float(found[1]) * _UNITS[unit])
    if size < 1:
        raise UsageError(f"{text!r} is no memory at all", hint="write it like 2GB, 1500M or 1.5GiB")
    return size


def limit_of(text: str | None) -> int | None:
    """The limit that --max-memory sets; None where it was not given. Raises UsageError."""
    return None if text is None else parse_size(text)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a loaded model takes in bytes: `fixed` whatever it does, and `token` for each token in its KV cache."""

    fixed: int
    token: int

    @classmethod
    def of(cls, manifest: Manifest, max_num_seqs: int) -> Footprint:
        """The process, the weights with what a session adds, and the logits of a step in FP32."""
        logits = (max_num_seqs + 2) * manifest.network.vocab_size * 4
        weights = int(manifest.memory.weights_bytes * WEIGHTS_FACTOR)
        return cls(PROCESS_BYTES + weights + logits, manifest.memory.kv_bytes_per_token)


def share_of(limit_bytes: int, models: int) -> int:
    """The limit of one of several models in a process: equal parts of what the process itself leaves."""
    return PROCESS_BYTES + (limit_bytes - PROCESS_BYTES) // models


def fit(
    manifest: Manifest, options: EngineOptions, limit_bytes: int | None, available_bytes: int | None
) -> EngineOptions:
    """The options with the context length and concurrency that fit `limit_bytes` and what the device has available.

    Without a limit the options stay as they are. Raises StillhouseError, with the figures, where the model cannot be
    loaded and hold a conversation within the memory.
    """
    footprint = Footprint.of(manifest, options.max_num_seqs if limit_bytes is None else 1)
    least = min(LEAST_CONTEXT_TOKENS, manifest.network.context_length, options.max_model_len or LEAST_CONTEXT_TOKENS)
    need = footprint.fixed + least * footprint.token
    for error, said, have in (
        (StillhouseError, "--max-memory allows", limit_bytes),
        (TooLittleMemory, "the device has available", available_bytes),
    ):
        if have is not None and need > have:
            raise error(
                f"{manifest.model} does not fit: weights and runtime take {megabytes(footprint.fixed)},"
                f" with a context of {least} tokens {megabytes(need)}; {said} {megabytes(have)}",
                hint="take a smaller precision or model, or end what else uses the memory",
            )
    if limit_bytes is None:
        return options
    budget = min(limit_bytes, available_bytes or limit_bytes)
    return _sized(manifest, options, budget)


def fits_instead(new: Manifest, old: Manifest, available_bytes: int | None) -> bool:
    """Whether `new` fits, with its least context, into what is available once `old`, loaded now, has gone."""
    footprint, freed = Footprint.of(new, 1), Footprint.of(old, 1).fixed - PROCESS_BYTES
    need = footprint.fixed + min(LEAST_CONTEXT_TOKENS, new.network.context_length) * footprint.token
    return available_bytes is None or need <= available_bytes + freed


def _sized(manifest: Manifest, options: EngineOptions, budget_bytes: int) -> EngineOptions:
    """The options within `budget_bytes` in all: first one long context, then more at a time."""
    footprint = Footprint.of(manifest, 1)
    logits_bytes = Footprint.of(manifest, 2).fixed - footprint.fixed
    kv_bytes = budget_bytes - footprint.fixed
    capacity = kv_bytes // footprint.token
    wanted = options.max_model_len or min(DEFAULT_MODEL_LEN_TOKENS, manifest.network.context_length)
    if options.max_model_len is not None and capacity < wanted:
        raise StillhouseError(
            f"--max-model-len {wanted} needs {megabytes(wanted * footprint.token)} of KV cache for {manifest.model},"
            f" {megabytes(kv_bytes)} are left within the memory: {capacity} tokens",
            hint=f"ask for at most --max-model-len {capacity}",
        )
    length = min(wanted, capacity)
    # Each further sequence takes a context of its own, and its logits.
    further = max(0, kv_bytes - length * footprint.token) // (length * footprint.token + logits_bytes)
    sequences = min(options.max_num_seqs, 1 + further)
    capacity = (kv_bytes - (sequences - 1) * logits_bytes) // footprint.token
    return options.model_copy(
        update={
            "max_model_len": length,
            "max_num_seqs": sequences,
            "kv_cache_bytes": capacity * footprint.token,
            # On a GPU the slots of kept prompts are allocated like any other.
            "prefix_slots": min(options.prefix_slots, max(0, capacity // length - sequences)),
        }
    )


def describe_fit(manifest: Manifest, options: EngineOptions, limit_bytes: int) -> str:
    """What was derived, in a line."""
    return (
        f"{manifest.model} within {megabytes(limit_bytes)}: context {options.max_model_len} tokens,"
        f" {options.max_num_seqs} at a time, KV cache {megabytes(options.kv_cache_bytes or 0)},"
        f" weights {megabytes(manifest.memory.weights_bytes)}"
    )


def megabytes(size: int) -> str:
    """A size in MB or GB, in thousands."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"
