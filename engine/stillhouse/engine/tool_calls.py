"""Calls of tools in a conversation, as chat templates want them: clients send the arguments as JSON in a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.engine.errors import InvalidRequest, shown


class _Arguments(dict[str, Any]):
    """An object to templates that write it as JSON (Qwen's), the text as it came to those that add it to others
    (DeepSeek's)."""

    def __init__(self, text: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, behind: str) -> str:
        return self._text + behind

    def __radd__(self, before: str) -> str:
        return before + self._text


def with_objects(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the arguments of assistants' calls as objects, empty ones where there are none: as in vLLM.

    Raises InvalidRequest, naming the call whose arguments are no such JSON.
    """
    return [
        {**said, "tool_calls": _read_calls(calls, f"messages[{index}].tool_calls")}
        if said["role"] == "assistant" and (calls := said.get("tool_calls"))
        else said
        for index, said in enumerate(messages)
    ]


def _read_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise InvalidRequest(f"{place} must be a list, got {shown(calls)}")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{place}[{index}] must be an object with a function, got {shown(call)}")
        arguments = _read_arguments(function.get("arguments"), f"{place}[{index}].function.arguments")
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _read_arguments(given: Any, place: str) -> Mapping[str, Any]:
    text = given or "{}"
    if isinstance(text, Mapping):
        return text
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{place} must be a text with a JSON object, got {shown(given)}")
    return _Arguments(text, fields)
