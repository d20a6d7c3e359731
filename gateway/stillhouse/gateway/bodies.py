"""The bodies of requests: OpenAI's fields, and vLLM's beside them. What is neither here nor neutral is refused by name.

Null stands for "not given", as OpenAI's clients send it, whatever the field is called.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from stillhouse.engine.sampling import MAX_COUNT, MAX_STOPS


def _read_whole(value: Any) -> Any:
    """10.0 is a whole number to JSON, and to those whose language has no other."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_read_whole)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
# Without fail_fast a list of a million wrong entries is a million faults, a kilobyte each.
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Texts = Annotated[list[NonEmpty], Field(fail_fast=True)]
Messages = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_unknown_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict) or None not in given.values():
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in given.items() if value is not None or name in known}


class StreamOptions(_Strict):
    """`include_obfuscation` pads OpenAI's own streams; here it has no effect."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(_Strict):
    """The form of an answer; it is always followed strictly."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(_Strict):
    """vLLM's: exactly one of these, and what says how it is to be followed, as it is here anyway."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: NonEmpty | None = None
    choice: Texts | None = None
    grammar: NonEmpty | None = None
    disable_fallback: Literal[False] | None = Field(default=None, exclude=True)
    disable_any_whitespace: Literal[False] | None = Field(default=None, exclude=True)
    disable_additional_properties: Literal[False] | None = Field(default=None, exclude=True)


class GenerationBody(_Strict):
    """What chats and completions have in common."""

    model: NonEmpty
    n: Whole | None = Field(default=None, ge=1, le=128)
    max_tokens: Whole | None = Field(default=None, ge=0, le=MAX_COUNT)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**64 - 128)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None

    # vLLM's
    top_k: Whole | None = Field(default=None, ge=-1, le=MAX_COUNT)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    min_tokens: Whole | None = Field(default=None, ge=0, le=MAX_COUNT)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOPS)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: NonEmpty | None = None
    guided_choice: Texts | None = None
    guided_grammar: NonEmpty | None = None
    spaces_between_special_tokens: bool | None = None
    thinking_token_budget: Whole | None = Field(default=None, ge=0, le=MAX_COUNT)
    prompt_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    priority: Whole | None = Field(default=None, ge=-(2**31), lt=2**31)

    # Sent by OpenAI's and vLLM's clients and frameworks, and without effect on an answer here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    guided_decoding_backend: str | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Whole | None = Field(default=None, ge=1, le=MAX_COUNT)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str | Annotated[list[str], Field(fail_fast=True)] | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    )
    logprobs: Whole | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    best_of: Whole | None = Field(default=None, ge=1)
    suffix: str | None = None


class TokenizeBody(_Strict):
    """POST /tokenize: a prompt or a conversation (vLLM's). The model may be left out where there is one alone."""

    model: NonEmpty | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Strict):
    """POST /detokenize (vLLM's)."""

    model: NonEmpty | None = None
    tokens: TokenIds
