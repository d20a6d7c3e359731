"""From a body's fields to the engine's sampling parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from stillhouse.engine.errors import InvalidRequest
from stillhouse.engine.sampling import SamplingParams, parse_params
from stillhouse.gateway.bodies import ChatBody, GenerationBody
from stillhouse.gateway.errors import ApiError, invalid, too_long
from stillhouse.gateway.generator import ServedModel

COMPLETION_TOKENS = 16  # OpenAI's and vLLM's default of max_tokens for completions

# What a body calls as the engine does, and what has no default of the model's own.
_SAME_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "priority",
)
_ENGINES_WORD = re.compile(r"(structured_outputs)(\.\w+)?")
# Thinking tokens that an effort allows; None: as many as the model likes.
EFFORT_TOKENS: dict[str, int | None] = {
    "none": 0,
    "minimal": 128,
    "low": 512,
    "medium": 2048,
    "high": None,
    "xhigh": None,
    "max": None,
}


def sampling_params(
    body: GenerationBody,
    model: ServedModel,
    num_prompt_tokens: int,
    max_tokens: int | None,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The parameters of every answer; what the body leaves open is the model's own default (generation_config.json).

    To be called once a request: up to 4,096 prompts, and as many entries of logit_bias, would take seconds together.
    `num_prompt_tokens` is that of the longest prompt; `max_tokens` None is whatever the context still holds. Raises
    ApiError for a prompt and an answer that do not fit the context, InvalidRequest for parameters that do not go
    together.
    """
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options may only be given where stream is true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs are not given where stream is true", "prompt_logprobs")
    _refuse_other_texts(body, model)
    room = model.max_model_len - num_prompt_tokens
    if room < 1 or (max_tokens is not None and max_tokens > room):
        raise too_long(num_prompt_tokens, max(1, max_tokens or 1), model.max_model_len)
    given: dict[str, Any] = {name: value for name in _SAME_NAMES if (value := getattr(body, name)) is not None}
    given["max_tokens"] = room if max_tokens is None else max(1, max_tokens)
    given["logprobs"] = logprobs
    given["prompt_logprobs"] = prompt_logprobs
    form = _form(body)
    given["structured_outputs"] = form and form[1]
    given["thinking_token_budget"] = _thinking_budget(body, model)
    try:
        return parse_params(given, model.default_params)
    except InvalidRequest as error:
        raise as_sent(error, body) from None


def answer_params(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of answer `index` of several: with a seed, each has its own, and always the same."""
    return params if params.seed is None or index == 0 else replace(params, seed=params.seed + index)


def as_sent(error: InvalidRequest, body: GenerationBody) -> InvalidRequest | ApiError:
    """The error with the body's own word where the engine speaks of structured_outputs."""
    form, said = _form(body), _ENGINES_WORD.match(str(error))
    if form is None or said is None or form[0] == said[1]:
        return error
    hint = f" ({error.hint})" if error.hint else ""
    return invalid(f"{form[0]}{str(error)[said.end() :]}{hint}", form[0])


def _form(body: GenerationBody) -> tuple[str, dict[str, Any]] | None:
    """The one form that was asked for, of OpenAI's field and vLLM's two ways to say it, and the field's name."""
    forms: list[tuple[str, dict[str, Any]]] = []
    if body.response_format is not None and body.response_format.type != "text":
        forms.append(("response_format", _response_format(body)))
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        named = {kind: value for kind, value in given.items() if value is not False}
        if len(named) != 1:
            raise invalid("structured_outputs must have exactly one field", "structured_outputs")
        forms.append(("structured_outputs", named))
    guided = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    asked = ((name, getattr(body, name)) for name in guided)
    forms += [(name, {name.removeprefix("guided_"): value}) for name, value in asked if value is not None]
    if len(forms) > 1:
        raise invalid(f"{forms[0][0]} and {forms[1][0]} exclude each other", forms[1][0])
    return forms[0] if forms else None


def _refuse_other_texts(body: GenerationBody, model: ServedModel) -> None:
    """Raises ApiError for fields of vLLM's that would have the text be another here than there."""
    if body.spaces_between_special_tokens is False and body.skip_special_tokens is False:
        raise invalid(
            "spaces_between_special_tokens cannot be false where skip_special_tokens is: leave one out",
            "spaces_between_special_tokens",
        )
    if isinstance(body, ChatBody) and body.include_reasoning is False and model.thinking_tags is not None:
        raise invalid(
            f"include_reasoning cannot be false, {model.name} thinks: leave it out, and reasoning_content unread",
            "include_reasoning",
        )


def _response_format(body: GenerationBody) -> dict[str, Any]:
    wanted = body.response_format
    if wanted is None or wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise invalid("response_format.json_schema.schema is missing", "response_format")
    return {"json": wanted.json_schema.schema_}


def _thinking_budget(body: GenerationBody, model: ServedModel) -> int | None:
    effort = body.reasoning_effort if isinstance(body, ChatBody) else None
    if effort is None:
        return body.thinking_token_budget
    if model.thinking_tags is None:
        if effort == "none":
            return body.thinking_token_budget
        raise invalid(f"reasoning_effort: {model.name} does not think: leave it out", "reasoning_effort")
    if body.thinking_token_budget is not None:
        raise invalid("reasoning_effort and thinking_token_budget exclude each other", "thinking_token_budget")
    return EFFORT_TOKENS[effort]
