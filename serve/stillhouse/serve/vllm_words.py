"""Sampling parameters in the words of Triton's vLLM backend, where the engine has others or none.

Source of the names: vLLM's SamplingParams and the backend's TritonSamplingParams.from_dict
(https://github.com/triton-inference-server/vllm_backend, src/utils/vllm_backend_utils.py), whose values may be texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillhouse.engine.errors import InvalidRequest, shown
from stillhouse.engine.neutral import NEUTRAL, is_neutral

# Of what the engine does not have: taken where it asks for what is so anyway.
_IDLE = (
    *("allowed_token_ids", "bad_words", "best_of", "detokenize", "early_stopping", "length_penalty"),
    *("logits_processors", "spaces_between_special_tokens", "truncate_prompt_tokens", "use_beam_search"),
)


def engine_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as the engine calls them. Raises InvalidRequest for one that would change something here."""
    words = dict(given)
    for name in _IDLE:
        if name in words and not is_neutral(name, value := _unquoted(words.pop(name))):
            neutral = " or ".join(map(json.dumps, NEUTRAL[name]))
            hint = "leave it out" + (f", or send {neutral}" if neutral else "")
            raise InvalidRequest(f"{name} is not supported here, got {shown(value)}", hint=hint)
    if (guided := _unquoted(words.pop("guided_decoding", None))) is not None:
        if words.get("structured_outputs") is not None:
            raise InvalidRequest("guided_decoding and structured_outputs exclude each other")
        words["structured_outputs"] = _form("guided_decoding", guided)
    return words


def _form(name: str, guided: Any) -> dict[str, Any]:
    """What is asked of the form; which backend of vLLM's is to see to it makes no difference here."""
    if not isinstance(guided, Mapping):
        raise InvalidRequest(f"{name} must be an object, got {shown(guided)}")
    return {kind: value for kind, value in guided.items() if kind != "backend" and value is not False}


def _unquoted(value: Any) -> Any:
    """The value of a text that is JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower() if value in ("True", "False", "None") else value)
    except (ValueError, RecursionError):
        return value
