"""A conversation as OpenAI's clients send it, made ready for the engine's chat template or refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.engine.errors import shown
from stillhouse.gateway.bodies import ChatBody
from stillhouse.gateway.errors import invalid
from stillhouse.gateway.generator import ServedModel

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Beside role and content, with their types. Templates leave out the first three as they like (thoughts are for one
# turn); one that does not know the others would have the model answer another conversation.
_TYPES: dict[str, type] = {
    "name": str,
    "reasoning_content": str,
    "reasoning": str,  # what newer versions of vLLM call it
    "tool_calls": list,
    "tool_call_id": str,
    "refusal": str,
    "annotations": list,
}
_RENDERED_OR_REFUSED = ("tool_calls", "tool_call_id", "refusal", "annotations")
_PUT_IN_HERE = ("messages", "add_generation_prompt")


def ready_messages(messages: Sequence[Mapping[str, Any]], model: ServedModel) -> list[dict[str, Any]]:
    """The messages with their content as one text each, without fields that are null. Raises ApiError."""
    if not messages:
        raise invalid("messages must hold at least one message", "messages")
    return [_ready(message, f"messages.{index}", model) for index, message in enumerate(messages)]


def check_variables(variables: Mapping[str, Any] | None) -> None:
    """Raises ApiError for a variable of the template that it gets from the conversation itself."""
    for name in _PUT_IN_HERE:
        if variables and name in variables:
            raise invalid(
                f"chat_template_kwargs.{name}: leave it out, it follows from the request", "chat_template_kwargs"
            )


def check_tools(body: ChatBody, model: ServedModel) -> None:
    """Raises ApiError for tools: a model that is never told of them, or whose calls nobody reads, must not seem to."""
    if body.tool_choice == "none":
        return  # the model is not to call any, and need not be told of them
    if not body.tools:
        if body.tool_choice not in (None, "auto"):
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
    given.pop("cache_control", None)  # a hint to caches, and nothing of an answer
    if unknown := sorted(given.keys() - _TYPES.keys() - {"role", "content"}):
        raise invalid(f"unknown field {place}.{unknown[0]!s}", f"{place}.{unknown[0]!s}", "unknown_field")
    if given.get("role") not in _ROLES:
        raise invalid(
            f"{place}.role must be one of {', '.join(_ROLES)}, got {shown(given.get('role'))}", f"{place}.role"
        )
    for name, kind in _TYPES.items():
        if name in given and not isinstance(given[name], kind):
            words = "string" if kind is str else "list"
            raise invalid(f"{place}.{name} must be a {words}, got {shown(given[name])}", f"{place}.{name}")
    for name in _RENDERED_OR_REFUSED:
        if name in given and not model.tokenizer.template_mentions(name):
            raise invalid(f"{place}.{name}: the chat template of {model.name} does not render it", f"{place}.{name}")
    content = message.get("content")
    # An answer that was cut off in its thoughts has no content, and clients send it back as they got it.
    if content in (None, []) and not given.keys() & {"tool_calls", "reasoning_content", "reasoning"}:
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
        known = {"type", kind, "prompt_cache_breakpoint", "cache_control"}  # the last two ask caches, not for an answer
        if unknown := sorted(name for name in part.keys() - known if part[name] is not None):
            raise invalid(
                f"unknown field {place}.{index}.{unknown[0]}", f"{place}.{index}.{unknown[0]}", "unknown_field"
            )
        texts.append(part[kind])
    return "\n".join(texts)
