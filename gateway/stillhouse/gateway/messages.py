"""A conversation as OpenAI's clients send it, made ready for the engine's chat template or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.gateway.bodies import ChatBody
from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import ServedModel

_FIELDS = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id", "refusal", "annotations"}
_TOOL_FIELDS = ("tool_calls", "tool_call_id")


def ready_messages(messages: Sequence[Mapping[str, Any]], model: ServedModel) -> list[dict[str, Any]]:
    """The messages with their content as one text each, without fields that are null. Raises ApiError."""
    if not messages:
        raise invalid("messages must hold at least one message", "messages")
    return [_ready(message, f"messages.{index}", model) for index, message in enumerate(messages)]


def check_tools(body: ChatBody, model: ServedModel) -> None:
    """Raises ApiError for tools: a model that is never told of them, or whose calls nobody reads, must not seem to."""
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise invalid("tool_choice names a tool, but there are no tools", "tool_choice")
        return
    if not model.tokenizer.template_mentions("tools"):
        why = f"the chat template of {model.name} does not render tools, so the model would never see them"
    else:
        why = "calls of tools in an answer are not read here; describe the tools in a message, or use response_format"
    raise invalid(f"tools cannot be used: {why}", "tools", "tools_unsupported")


def _ready(message: Mapping[str, Any], place: str, model: ServedModel) -> dict[str, Any]:
    given = {name: value for name, value in message.items() if value not in (None, [])}
    if given.get("type") in ("message", "text"):
        del given["type"]  # some clients say so of every message
    if unknown := sorted(given.keys() - _FIELDS):
        raise invalid(f"unknown field {place}.{unknown[0]!s}", f"{place}.{unknown[0]!s}", "unknown_field")
    if not isinstance(given.get("role"), str) or not given["role"]:
        raise invalid(f"{place}.role is missing or no string", f"{place}.role")
    for name in _TOOL_FIELDS:
        if name in given and not model.tokenizer.template_mentions(name):
            raise invalid(f"{place}.{name}: the chat template of {model.name} does not render it", f"{place}.{name}")
    content = message.get("content")
    if content is None and "tool_calls" not in given:
        raise invalid(f"{place}.content is missing", f"{place}.content")
    return {**given, "content": _text(content, f"{place}.content")}


def _text(content: Any, place: str) -> str:
    """The content itself, or the texts of its parts, joined by line breaks as vLLM joins them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place} must be a string or a list of parts, got {type(content).__name__}", place)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise invalid(f"{place}.{index}: only parts of text are understood here, got {kind!r}", f"{place}.{index}")
        texts.append(part[kind])
    return "\n".join(texts)
