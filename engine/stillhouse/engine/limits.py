"""How large an engine is: from its options, the model and the machine's memory."""

from __future__ import annotations

import logging
import os

from stillhouse.engine.errors import UsageError
from stillhouse.engine.manifest import Manifest
from stillhouse.engine.options import EngineOptions
from stillhouse.engine.scheduler import LEAST_WAITING, Limits

log = logging.getLogger(__name__)

# What is served when nothing else is said: room for a conversation, within a tenth of the machine's memory.
DEFAULT_MODEL_LEN_TOKENS = 4096
LEAST_MODEL_LEN_TOKENS = 2048
KV_SHARE_OF_MEMORY = 0.1


def limits_of(manifest: Manifest, options: EngineOptions, *, allocated_whole: bool = False) -> Limits:
    """Sizes in sequences and tokens; the context served fits the KV budget.

    With `allocated_whole` the cache takes slots × context at once, as on a CUDA device, and there are as many slots as
    the budget holds. Raises UsageError for a context longer than the model's, or a budget that does not hold the
    context.
    """
    network, per_token = manifest.network, manifest.memory.kv_bytes_per_token
    wanted = options.max_model_len or min(DEFAULT_MODEL_LEN_TOKENS, network.context_length)
    if wanted > network.context_length:
        raise UsageError(
            f"max_model_len is {wanted}, but {manifest.model} was made for {network.context_length} tokens",
            hint=f"ask for at most {network.context_length}",
        )
    capacity = _budget_bytes(options) // per_token
    if options.max_model_len is None:
        wanted = min(wanted, max(capacity, min(LEAST_MODEL_LEN_TOKENS, network.context_length)))
    if options.kv_cache_bytes is None and options.kv_cache_share is None:
        capacity = max(capacity, wanted)
    if capacity < wanted:
        raise UsageError(
            f"a KV cache of {_budget_bytes(options)} bytes holds {capacity} tokens, but max_model_len is {wanted}",
            hint=f"give at least {wanted * per_token} bytes, or ask for a smaller max_model_len",
        )
    slots, prefix_slots = options.max_num_seqs, options.prefix_slots
    if allocated_whole:
        slots, prefix_slots = _slots_within(capacity, wanted, options, per_token)
    return Limits(
        slots=slots,
        max_model_len=wanted,
        kv_capacity_tokens=min(capacity, (slots + prefix_slots) * wanted),
        prefill_chunk_tokens=options.prefill_chunk_tokens,
        prefill_alone_tokens=max(options.prefill_alone_tokens, options.prefill_chunk_tokens),
        # As long as all answers of a batch take, and no longer, is what the last one waits.
        max_waiting=max(slots, LEAST_WAITING) if options.max_waiting is None else options.max_waiting,
        prefix_slots=prefix_slots,
    )


def _slots_within(capacity: int, context: int, options: EngineOptions, per_token: int) -> tuple[int, int]:
    """Slots for sequences and for kept prompts, each of `context` tokens; the kept ones give way first."""
    most = capacity // context
    slots = min(options.max_num_seqs, most)
    prefix_slots = min(options.prefix_slots, most - slots)
    if (slots, prefix_slots) != (options.max_num_seqs, options.prefix_slots):
        log.warning(
            "a KV cache of %d bytes holds %d slots of %d tokens on a device: max_num_seqs is %d instead of %d, "
            "prefix_slots %d instead of %d; with all of them it takes %d bytes",
            *(capacity * per_token, most, context, slots, options.max_num_seqs, prefix_slots, options.prefix_slots),
            (options.max_num_seqs + options.prefix_slots) * context * per_token,
        )
    return slots, prefix_slots


def _budget_bytes(options: EngineOptions) -> int:
    if options.kv_cache_bytes is not None:
        return options.kv_cache_bytes
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(memory_bytes * (options.kv_cache_share or KV_SHARE_OF_MEMORY))
