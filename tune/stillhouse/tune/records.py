"""Records: mapped from a source's columns, checked, and read back as prompt and answer.

A record is a JSON object with `instruction`, `input` and `output`, or `messages` in OpenAI's form, and where it has
them `label` (its class), `group` (what must not be split apart), `synthetic`, and the columns that are kept. `source`
says where it came from.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from stillhouse.engine.errors import UsageError, shown
from stillhouse.tune.data_recipe import Source

Record = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Under which names a field is looked for where the recipe does not say.
_USUAL = {
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "answer", "completion"),
    "messages": ("messages", "conversations"),
    "label": ("label",),
    "group": ("group",),
}
_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRecord(ValueError):
    """What is wrong with one record, as a phrase that follows its place."""


class Mapping:
    """Which column is which field of a source's records."""

    def __init__(self, source: Source) -> None:
        self._named: dict[str, str] = {str(field): column for field, column in source.columns.items()}
        self._keep = source.keep

    def record(self, raw: dict[str, Any]) -> Record:
        """The record in our fields, checked. Raises BadRecord."""
        fields = {field: column for field in _USUAL if (column := self._column(field, raw))}
        missing = [f"column {column!r}" for column in self._named.values() if column not in raw]
        if missing:
            raise BadRecord(f"has no {missing[0]}")
        if "messages" in fields and ("messages" in self._named or "output" not in fields):
            record: Record = {"messages": _messages(raw[fields["messages"]])}
        else:
            record = _instruction(raw, fields)
        for field in ("label", "group"):
            if field in fields and (value := raw[fields[field]]) not in (None, ""):
                if isinstance(value, (dict, list, float)):
                    raise BadRecord(f"has a {field} that is {_kind(value)}, not a text")
                record[field] = str(value)
        return record | {column: raw[column] for column in self._keep if column in raw}

    def check_columns(self, where: str, columns: Sequence[str]) -> None:
        """Raises UsageError where a table with these columns cannot give records."""
        for field, column in self._named.items():
            if column not in columns:
                raise _no_column(where, f"{column!r} (for {field})", columns)
        found = {field for field in _USUAL if self._column(field, dict.fromkeys(columns, ""))}
        if "messages" not in found and not {"instruction", "output"} <= found:
            missing = "instruction" if "instruction" not in found else "output"
            raise _no_column(where, f"for {missing}", columns)

    def _column(self, field: str, raw: dict[str, Any]) -> str | None:
        if field in self._named:
            return self._named[field] if self._named[field] in raw else None
        taken = self._named.values()
        return next((name for name in _USUAL[field] if name in raw and name not in taken), None)


def prompt_of(record: Record) -> str:
    """All that stands before the answer, as plain text."""
    if "messages" in record:
        return "\n\n".join(message["content"] for message in record["messages"][:-1])
    return "\n\n".join(text for text in (record["instruction"], record["input"]) if text)


def answer_of(record: Record) -> str:
    """The answer: what the model is to learn to say."""
    return str(record["messages"][-1]["content"] if "messages" in record else record["output"])


def conversation_of(record: Record) -> list[dict[str, str]]:
    """The record as messages whose last one is the answer."""
    if "messages" in record:
        return list(record["messages"])
    return [{"role": "user", "content": prompt_of(record)}, {"role": "assistant", "content": answer_of(record)}]


def with_texts(record: Record, change: Any) -> Record:
    """The record with `change(text)` in place of each of its texts."""
    if "messages" in record:
        messages = [message | {"content": change(message["content"])} for message in record["messages"]]
        return record | {"messages": messages}
    return record | {field: change(record[field]) for field in ("instruction", "input", "output")}


def _instruction(raw: dict[str, Any], fields: dict[str, str]) -> Record:
    record: Record = {}
    for field in ("instruction", "input", "output"):
        value = raw[fields[field]] if field in fields else None
        if value is None and field != "input":
            raise BadRecord(f"has no {field}" + (f" ({fields[field]} is null)" if field in fields else ""))
        record[field] = _text(field, "" if value is None else value)
    if not record["instruction"].strip() and not record["input"].strip():
        raise BadRecord("has an empty instruction")
    if not record["output"].strip():
        raise BadRecord("has an empty output")
    return record


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a table holds JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"has messages that are {_kind(value)}, not a list of messages")
    messages = [_message(number, message) for number, message in enumerate(value)]
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"ends with the turn of the {messages[-1]['role']}: there is no answer")
    if not messages[-1]["content"].strip():
        raise BadRecord("has an empty answer")
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise BadRecord("has messages in which no user asks anything")
    return messages


def _message(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRecord(f"has messages[{number}] that is {_kind(message)}, not an object")
    if "from" in message and "role" not in message:  # ShareGPT's form
        message = {"role": _SHAREGPT.get(message["from"], message["from"]), "content": message.get("value")}
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord(f"has messages[{number}] with the role {shown(role)}; known: {', '.join(ROLES)}")
    return {"role": role, "content": _text(f"messages[{number}].content", message.get("content"))}


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"has {field} that is {_kind(value)}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(f"has half a character (a lone surrogate) in {field}") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    return {int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _no_column(where: str, what: str, columns: Sequence[str]) -> UsageError:
    return UsageError(
        f"{where} has no column {what}; it has {', '.join(columns)}",
        hint='say which is which under [[sources]]: columns = { instruction = "…", output = "…" }',
    )
