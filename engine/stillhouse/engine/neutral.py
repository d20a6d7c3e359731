"""Fields of OpenAI's and vLLM's APIs behind which there is nothing here: taken where they ask for what is so anyway.

Frameworks send their defaults with every request. Null is always such a value; any other than those here is refused by
name, for an answer that silently differs from what was asked is worse than none.
"""

from __future__ import annotations

from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "verbosity": ("medium",),
    # vLLM's
    **dict.fromkeys(
        ("use_beam_search", "early_stopping", "continue_final_message", "echo", "return_token_ids"), (False,)
    ),
    **dict.fromkeys(
        ("detokenize", "spaces_between_special_tokens", "add_generation_prompt", "include_reasoning"), (True,)
    ),
    **dict.fromkeys(("best_of", "length_penalty"), (1,)),
    **dict.fromkeys(("bad_words", "documents", "logits_processors"), ([],)),
    **dict.fromkeys(("media_io_kwargs", "mm_processor_kwargs", "vllm_xargs"), ({},)),
    **dict.fromkeys(("allowed_token_ids", "chat_template", "guided_whitespace_pattern", "kv_transfer_params"), ()),
    **dict.fromkeys(("prompt_embeds", "repetition_detection", "structural_tag", "suffix"), ()),
    "truncate_prompt_tokens": (),
}


def is_neutral(name: str, value: Any) -> bool:
    """Whether the field called `name` changes nothing with `value`."""
    # To Python true is 1; to who sends it, it is not.
    return value is None or any(value == one and (value is True) == (one is True) for one in NEUTRAL[name])
