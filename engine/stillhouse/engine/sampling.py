"""Sampling parameters in vLLM's words, read strictly; sampler.py obeys them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from stillhouse.engine.errors import InvalidRequest, shown

# Every one is looked at for every token.
MAX_STOPS, MAX_STOP_CHARACTERS = 256, 4096
MAX_BIASES = 4096
MAX_COUNT = 2**31 - 1  # of tokens: no context holds as many, and JSON takes thousands of digits
_WHOLE = re.compile("-?[0-9]{1,30}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """The form that an answer must have; `kind` says what `value` is (vLLM's `StructuredOutputsParams`)."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar"]
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token; names, defaults and ranges are those of vLLM's `SamplingParams`.

    `temperature` 0 is greedy. `top_k` 0 or -1 and `top_p` 1 switch these filters off. `stop` strings end the
    text before them. `seed` None draws one; of `n` answers, answer i has the seed `seed` + i. At most
    `thinking_token_budget` tokens between <think> and </think>, then the end tag is forced. Of those who wait for a
    slot, the lower `priority` comes first.
    """

    n: int = 1

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    thinking_token_budget: int | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise InvalidRequest(f"{name} must be {rule}, got {shown(value)}")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}")

    @property
    def greedy(self) -> bool:
        # vLLM's own limit: below it a float32 division overflows, and the answer is greedy anyway.
        return self.temperature < 1e-5


def _finite(value: float) -> bool:
    return math.isfinite(value)


_RULES: dict[str, tuple[str, Any]] = {
    "n": ("between 1 and 128", lambda v: 1 <= v <= 128),
    "max_tokens": (f"at least 1 and at most {MAX_COUNT}", lambda v: 1 <= v <= MAX_COUNT),
    "min_tokens": (f"at least 0 and at most {MAX_COUNT}", lambda v: 0 <= v <= MAX_COUNT),
    "temperature": ("between 0 and 100", lambda v: _finite(v) and 0 <= v <= 100),
    "top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "top_k": (f"-1, 0 (off) or more, at most {MAX_COUNT}", lambda v: -1 <= v <= MAX_COUNT),
    "min_p": ("between 0 and 1", lambda v: 0 <= v <= 1),
    # Beyond these bounds float32 would overflow; nobody means them.
    "repetition_penalty": ("above 0, at least 1e-6 and at most 1e6", lambda v: 1e-6 <= v <= 1e6),
    "presence_penalty": ("between -2 and 2", lambda v: -2 <= v <= 2),
    "frequency_penalty": ("between -2 and 2", lambda v: -2 <= v <= 2),
    "seed": ("a whole number of 64 bits", lambda v: -(2**63) <= v < 2**64),
    "stop": (
        f"a list of non-empty strings, {MAX_STOPS} at most and {MAX_STOP_CHARACTERS} characters in all",
        lambda v: len(v) <= MAX_STOPS and all(v) and sum(map(len, v)) <= MAX_STOP_CHARACTERS,
    ),
    "stop_token_ids": (
        f"a list of token ids, {MAX_STOPS} at most",
        lambda v: len(v) <= MAX_STOPS and all(t >= 0 for t in v),
    ),
    "logprobs": ("between 0 and 20", lambda v: 0 <= v <= 20),
    "prompt_logprobs": ("between 0 and 20", lambda v: 0 <= v <= 20),
    "thinking_token_budget": (f"at least 0 and at most {MAX_COUNT}", lambda v: 0 <= v <= MAX_COUNT),
    "priority": ("a whole number of 32 bits", lambda v: -(2**31) <= v < 2**31),
    "logit_bias": (
        f"at most {MAX_BIASES} token ids with a bias between -100 and 100",
        lambda v: len(v) <= MAX_BIASES and all(-100 <= b <= 100 for b in v.values()),
    ),
}


def parse_params(given: Mapping[str, Any], defaults: SamplingParams | None = None) -> SamplingParams:
    """Sampling parameters from untyped ones (JSON; values may be strings, as Triton's vLLM backend allows).

    Raises InvalidRequest, naming the parameter that is unknown, ill-typed or out of range.
    """
    known = {f.name for f in fields(SamplingParams)}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise InvalidRequest(f"unknown sampling parameter {shown(name)}", hint=f"known: {', '.join(sorted(known))}")
        if value is not None:
            changes[name] = _READERS[name](name, value)
        elif name in _NULLABLE:
            changes[name] = None
    return replace(defaults or SamplingParams(), **changes)


def _read_int(name: str, value: Any) -> int:
    if isinstance(value, str):
        # Python's int() takes more: spaces, underscores, digits of any script.
        if not _WHOLE.fullmatch(value):
            raise InvalidRequest(f"{name} must be a whole number, got {shown(value)}")
        return int(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value
        or value in (math.inf, -math.inf)
    ):
        raise InvalidRequest(f"{name} must be a whole number, got {shown(value)}")
    if int(value) != value:
        raise InvalidRequest(f"{name} must be a whole number, got {shown(value)}")
    return int(value)


def read_number(name: str, value: Any) -> float:
    """A finite number, as such or as a text. Raises InvalidRequest, naming the parameter."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidRequest(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        raise InvalidRequest(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidRequest(f"{name} must be a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number, got {shown(value)}")
    return number


def read_bool(name: str, value: Any) -> bool:
    """True or false, as such or as a text. Raises InvalidRequest, naming the parameter."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise InvalidRequest(f"{name} must be true or false, got {shown(value)}")


def _read_json_if_string(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{name} must be JSON, got {shown(value)}") from None


def _read_strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise InvalidRequest(f"{name} must be a string or a list of strings, got {shown(value)}")


def _read_ids(name: str, value: Any) -> tuple[int, ...]:
    value = _read_json_if_string(name, value)
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} must be a list of token ids, got {shown(value)}")
    return tuple(_read_int(name, item) for item in value)


def _read_bias(name: str, value: Any) -> dict[int, float]:
    value = _read_json_if_string(name, value)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be an object of token ids to biases, got {shown(value)}")
    biases = {_read_int(name, key): read_number(name, bias) for key, bias in value.items()}
    if len(biases) < len(value):
        raise InvalidRequest(f"{name} must name each token id once, got {shown(value)}")
    return biases


def _read_structure(name: str, value: Any) -> StructuredOutputs:
    """One of {"json": schema}, {"json_object": true}, {"regex": …}, {"choice": […]}, {"grammar": Lark}."""
    value = _read_json_if_string(name, value)
    known = ("json", "json_object", "regex", "choice", "grammar")
    if isinstance(value, Mapping):
        value = {kind: content for kind, content in value.items() if content is not None}
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in known:
        raise InvalidRequest(f"{name} must be an object with one of {', '.join(known)}, got {shown(value)}")
    kind: Any
    ((kind, content),) = value.items()
    if kind == "json":
        content = _read_json_if_string(f"{name}.json", content)
    types: dict[Any, tuple[type, ...]] = {"json": (Mapping, bool), "json_object": (bool,), "choice": (list, tuple)}
    if not isinstance(content, types.get(kind, (str,))) or content in ("", [], (), False):
        raise InvalidRequest(f"{name}.{kind} has a value of another type or none, got {shown(content)}")
    choices: Any = content if kind == "choice" else ()
    if not all(isinstance(item, str) and item for item in choices):
        raise InvalidRequest(f"{name}.choice must be a list of non-empty strings, got {shown(content)}")
    return StructuredOutputs(kind, content)


_NULLABLE = {"seed", "logprobs", "prompt_logprobs", "thinking_token_budget", "structured_outputs"}
_READERS: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"),
            *("thinking_token_budget", "priority"),
        ),
        _read_int,
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        read_number,
    ),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"), read_bool),
    "stop": _read_strings,
    "stop_token_ids": _read_ids,
    "logit_bias": _read_bias,
    "structured_outputs": _read_structure,
}
