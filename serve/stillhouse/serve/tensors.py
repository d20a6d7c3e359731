"""The tensors of Triton's vLLM backend, name by name, and what a request says with them.

Beyond that backend's, there are two more ways to give the prompt, `messages` and `input_ids`; one more output,
`details`: all that the engine tells of the tokens, as JSON (see answers.py); and three parameters: `priority` (of those
who wait, the lower comes first), `timeout_s`, and `probe` (only asks whether the model answers: no metric counts it).
Source of names, types and defaults: https://github.com/triton-inference-server/vllm_backend (src/model.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.engine.errors import InvalidRequest, PromptTooLong, shown
from stillhouse.engine.sampling import SamplingParams, parse_params, read_bool, read_number
from stillhouse.serve.errors import VllmRefusal
from stillhouse.serve.vllm_words import engine_words

# The outputs that come only when their `return_…` input is true.
EXTRA_OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens", "details")
PROMPTS = ("text_input", "messages", "input_ids")
# More is surely no prompt for any context. What is read here is read while execute() waits, JSON and lists in one piece
# with Python's lock held, so that the engine waits too.
MAX_JSON_CHARACTERS = 4 * 2**20
MAX_IDS = 2**20
FLAGS = ("stream", "exclude_input_in_output", *(f"return_{name}" for name in EXTRA_OUTPUTS))

INPUTS: list[dict[str, Any]] = [
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    {"name": "messages", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    {"name": "input_ids", "data_type": "TYPE_INT32", "dims": [-1], "optional": True},
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    *({"name": name, "data_type": "TYPE_BOOL", "dims": [1], "optional": True} for name in FLAGS),
]
OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "finish_reason", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "logprobs", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]},
    {"name": "num_output_tokens", "data_type": "TYPE_UINT32", "dims": [-1]},
    {"name": "details", "data_type": "TYPE_STRING", "dims": [-1]},
]


TensorReader = Callable[[str], "NDArray[Any] | None"]


def complete_config(config: Any) -> Any:
    """Adds to a model's config what config.pbtxt does not say: tensors, no batching by Triton, many responses.

    `config` is what Triton hands to auto_complete_config.
    """
    known = config.as_dict()
    inputs, outputs = ({tensor["name"] for tensor in known[kind]} for kind in ("input", "output"))
    for tensor in INPUTS:
        if tensor["name"] not in inputs:
            config.add_input(tensor)
    for tensor in OUTPUTS:
        if tensor["name"] not in outputs:
            config.add_output(tensor)
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": True})
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request as its tensors and parameters say it; exactly one of text, messages, input_ids is not None.

    `repeats_prompt`: the text of the answer begins with the prompt. `returns`: names of the extra outputs wanted.
    `timeout_s`: how long it may wait and run; None is for ever.
    `logprobs_asked`: the caller set `logprobs`, and not we because an output needs the sampled token's.
    `probe`: no metric counts it.
    """

    text: str | None
    messages: list[Any] | None
    input_ids: list[int] | None
    stream: bool
    repeats_prompt: bool
    params: SamplingParams
    logprobs_asked: bool
    returns: frozenset[str]
    timeout_s: float | None = None
    probe: bool = False


def read_question(tensor: TensorReader, parameters_json: str, timeout_us: int = 0) -> Question:
    """What a request asks. `tensor` gives an input by name, None where there is none; `timeout_us` is Triton's own
    request time-out in microseconds, 0 for none.

    `parameters_json` are Triton's request parameters. Those called like a flag stand for it (that is how
    `"parameters": {"stream": false}` of /generate arrives), the others are sampling parameters; a tensor goes before
    a parameter. Raises InvalidRequest, naming what is missing, twofold, unknown or ill-typed.
    """
    parameters = {
        name: value
        for name, value in _json_object("request parameters", parameters_json or "{}").items()
        if not name.startswith("triton_")
    }
    flags = {name: _read_flag(tensor, name, parameters.pop(name, None)) for name in FLAGS}
    text, messages, input_ids = _read_prompt(tensor)

    parameters.pop("id", None)  # a request's number in /generate's form, which Triton hands on as a parameter
    timeout_us = parameters.pop("timeout", None) or timeout_us  # that of /generate; no sampling parameter
    given = _read_string(tensor, "sampling_parameters")
    sampling = parameters | (_json_object("sampling_parameters", given) if given else {})
    timeout_s = _shortest_s(timeout_us, sampling.pop("timeout_s", None))
    probe = read_bool("probe", sampling.pop("probe", False))
    params = parse_params(engine_words(sampling))
    returns = frozenset(name for name in EXTRA_OUTPUTS if flags[f"return_{name}"])
    logprobs_asked = params.logprobs is not None
    if "cumulative_logprob" in returns and not logprobs_asked:
        params = replace(params, logprobs=0)

    stream = bool(flags["stream"])
    return Question(
        text=text,
        messages=messages,
        input_ids=input_ids,
        stream=stream,
        repeats_prompt=_repeats_prompt(flags["exclude_input_in_output"], stream, has_text=text is not None),
        params=params,
        logprobs_asked=logprobs_asked,
        returns=returns,
        timeout_s=timeout_s,
        probe=probe,
    )


def _shortest_s(timeout_us: Any, timeout_s: Any) -> float | None:
    """The shorter of the time-outs given: Triton's own, whose word for none is 0, and ours."""
    given = {"timeout": timeout_us or None, "timeout_s": timeout_s}
    times = {name: read_number(name, value) for name, value in given.items() if value is not None}
    for name, value in times.items():
        if value <= 0:
            raise InvalidRequest(f"{name} must be above 0, got {value:g}")
    return min((value / 1e6 if name == "timeout" else value for name, value in times.items()), default=None)


def _repeats_prompt(exclude: bool | None, stream: bool, *, has_text: bool) -> bool:
    """vLLM's rule for text: repeated unless excluded or streamed. Messages and ids are repeated only when asked."""
    if exclude is None:
        return has_text and not stream
    if stream and not exclude:
        raise VllmRefusal("When streaming, `exclude_input_in_output` = False is not allowed.")
    return not exclude


def _read_prompt(tensor: TensorReader) -> tuple[str | None, list[Any] | None, list[int] | None]:
    text, messages_json, ids = _read_string(tensor, "text_input"), _read_string(tensor, "messages"), tensor("input_ids")
    given = [name for name, value in zip(PROMPTS, (text, messages_json, ids), strict=True) if value is not None]
    if len(given) != 1:
        raise InvalidRequest(f"exactly one of {', '.join(PROMPTS)} must be given, got {' and '.join(given) or 'none'}")
    if text == "":
        raise InvalidRequest("text_input is empty: at least one character is needed")
    messages: list[Any] | None = None
    if messages_json is not None:
        messages = _json("messages", messages_json)
        if not isinstance(messages, list):
            raise InvalidRequest("messages must be a JSON list of {role, content} objects")
    if ids is not None and ids.size == 0:
        raise InvalidRequest("input_ids is empty: at least one token id is needed")
    if ids is not None and ids.size > MAX_IDS:
        raise PromptTooLong(f"input_ids holds {ids.size} token ids, at most {MAX_IDS} are read")
    return text, messages, None if ids is None else ids.reshape(-1).tolist()


def _read_string(tensor: TensorReader, name: str) -> str | None:
    array = tensor(name)
    if array is None:
        return None
    if array.size != 1:
        raise InvalidRequest(f"{name} must hold one string, got {array.size}")
    value = array.reshape(-1)[0]
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} must be UTF-8: byte {error.start} is not") from error


def _read_flag(tensor: TensorReader, name: str, parameter: Any) -> bool | None:
    array = tensor(name)
    if array is not None:
        if array.size != 1:
            raise InvalidRequest(f"{name} must hold one boolean, got {array.size}")
        return bool(array.reshape(-1)[0])
    if parameter is None or isinstance(parameter, bool):
        return parameter
    if isinstance(parameter, str) and parameter.lower() in ("true", "false"):
        return parameter.lower() == "true"
    raise InvalidRequest(f"{name} must be true or false, got {shown(parameter)}")


def _json_object(name: str, text: str) -> dict[str, Any]:
    value = _json(name, text)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} must be a JSON object, got {text[:40]!r}")
    return value


def _json(name: str, text: str) -> Any:
    if len(text) > MAX_JSON_CHARACTERS:
        kind = PromptTooLong if name == "messages" else InvalidRequest
        raise kind(f"{name} has {len(text)} characters of JSON, at most {MAX_JSON_CHARACTERS} are read")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} must be JSON: {error}") from error


def strings(*values: str) -> NDArray[np.object_]:
    """A STRING tensor (N,) as Triton takes it."""
    return np.array([value.encode("utf-8") for value in values], dtype=np.object_)
