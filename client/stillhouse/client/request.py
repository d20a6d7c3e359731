"""From a call's arguments to the tensors of a request, and from a response's outputs to a reply."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from stillhouse.client.errors import InvalidCall
from stillhouse.client.types import Message, Reply, Request

# Asked for with every request, so that tokens are counted by the server. All are in the vLLM backend's contract.
_ALWAYS = {
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_cumulative_logprob": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
_LARGEST_TOKEN_ID = 2**31 - 1  # the tensor's type is INT32

# A stillhouse server's own: one output that has all of these and more, at the cost of one.
_DETAILS = {"exclude_input_in_output": True, "return_details": True}


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds; None is for ever."""

    total_s: float | None
    token_s: float | None  # between tokens: from one to the next, once the first has come

    def __post_init__(self) -> None:
        for name, value in (("timeout_s", self.total_s), ("token_timeout_s", self.token_s)):
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise InvalidCall(f"{name} must be above 0 seconds, or None for no limit, got {value!r}")


class Unset(Enum):
    """Stands for an argument that was not given, where None means something."""

    UNSET = "unset"


UNSET = Unset.UNSET


def choose_limits(default: Limits, timeout_s: float | Unset | None, token_timeout_s: float | Unset | None) -> Limits:
    """A call's limits: its own where they are given, else the client's."""
    return Limits(
        default.total_s if isinstance(timeout_s, Unset) else timeout_s,
        default.token_s if isinstance(token_timeout_s, Unset) else token_timeout_s,
    )


def build_request(
    model: str,
    prompt: str | None,
    messages: Sequence[Message] | None,
    input_ids: Sequence[int] | None,
    version: str | int | None,
    sampling: Mapping[str, Any],
    *,
    stream: bool,
    details: bool = False,
    model_inputs: Collection[str] | None = None,
) -> Request:
    """The request for exactly one of prompt, messages and input_ids. Raises InvalidCall.

    Of what is asked for with every request, that alone which is among `model_inputs`, where they are known.
    """
    given = [
        name
        for name, value in (("prompt", prompt), ("messages", messages), ("input_ids", input_ids))
        if value is not None
    ]
    if len(given) != 1:
        raise InvalidCall(f"exactly one of prompt, messages and input_ids is given, got {', '.join(given) or 'none'}")
    if not model:
        raise InvalidCall("a model's name must not be empty")
    if version is not None and not str(version).isdecimal():
        raise InvalidCall(f"a model's version is a whole number, got {version!r}")
    if str(sampling.get("n") or 1) != "1":
        raise InvalidCall(f"n must be 1: one answer a call is read here, got {sampling['n']!r}", hint="call n times")
    inputs: dict[str, str | bool | list[int]] = {}
    if prompt is not None:
        inputs["text_input"] = prompt
    if messages is not None:
        if isinstance(messages, (str, Mapping)):
            raise InvalidCall(
                f"messages must be a list of messages, got {type(messages).__name__}",
                hint='for example [{"role": "user", "content": "Hello"}]; a text goes into prompt',
            )
        if strange := [message for message in messages if not isinstance(message, Mapping)]:
            raise InvalidCall(f'a message is {{"role": "…", "content": "…"}}, got {strange[0]!r:.60}')
        inputs["messages"] = _to_json("messages", [dict(message) for message in messages])
    if input_ids is not None:
        inputs["input_ids"] = _token_ids(input_ids)
    inputs["stream"] = stream
    if sampling:
        inputs["sampling_parameters"] = _to_json("sampling parameters", dict(sampling))
    for name, value in inputs.items():
        if isinstance(value, str) and not _is_unicode(value):
            raise InvalidCall(f"{name} must be text that UTF-8 can hold, got half a surrogate pair")
    wanted = _DETAILS if details else _ALWAYS
    if model_inputs is not None:
        wanted = {name: value for name, value in wanted.items() if name in model_inputs}
    return Request(model, "" if version is None else str(version), {**inputs, **wanted}, stream)


def reply_from(values: dict[str, Any], received_s: float) -> Reply:
    """The reply in a response's outputs by name, each its first element."""
    if "details" in values:
        return _detailed_reply(values, received_s)
    finish_reason = values.get("finish_reason")
    if str(finish_reason).lower() in ("none", ""):
        finish_reason = None  # what the vLLM backend writes before the end
    return Reply(
        text=values.get("text_output") or "",
        finish_reason=finish_reason,
        num_input_tokens=values.get("num_input_tokens"),
        num_output_tokens=values.get("num_output_tokens"),
        cumulative_logprob=values.get("cumulative_logprob"),
        received_s=received_s,
        has_finish_reason="finish_reason" in values,
    )


def _detailed_reply(values: dict[str, Any], received_s: float) -> Reply:
    details = json.loads(values["details"])
    return Reply(
        text=values.get("text_output") or "",
        finish_reason=details["finish_reason"],
        num_input_tokens=details["num_input_tokens"],
        num_output_tokens=len(details["token_ids"]),
        cumulative_logprob=None,
        received_s=received_s,
        details=details,
    )


def _token_ids(given: Sequence[int]) -> list[int]:
    try:
        ids = [operator.index(token) for token in given]
    except TypeError as error:
        raise InvalidCall(f"input_ids must be whole numbers: {error}") from None
    if wrong := [token for token in ids if not 0 <= token <= _LARGEST_TOKEN_ID]:
        raise InvalidCall(f"input_ids must be from 0 to {_LARGEST_TOKEN_ID}, got {wrong[0]}")
    return ids


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidCall(f"{what} must be what JSON can hold: {error}") from None
