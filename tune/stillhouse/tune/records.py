"""Records: mapped from a source's columns, checked, and read back as prompt and answer.

A record is a JSON object with `instruction`, `input` and `output`, or `messages` in OpenAI's form, and where it has
them `label` (its class), `group` (what must not be split apart), `synthetic`, and the columns that are kept. `source`
says where it came from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from stillhouse.engine.errors import UsageError, shown
from stillhouse.tune.data_recipe import Source
from stillhouse.tune.kept import changed, kept_value, whole_text

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
_MASKED_APART = ("instruction", "input", "output", "messages", "group")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_CALLS = ("tool_calls", "function_call")


class BadRecord(ValueError):
    """What is wrong with one record, as a phrase that follows its place."""


class Mapping:
    """Which column is which field of a source's records."""

    def __init__(self, source: Source) -> None:
        self._named: dict[str, str] = {str(field): column for field, column in source.columns.items()}
        self._keep = source.keep

    def record(self, raw: dict[str, Any]) -> Record:
        """The record in our fields, checked. Raises BadRecord."""
        fields = self._fields(raw)
        record: Record
        if self._is_chat(raw, fields, "output"):
            record = {"messages": _messages(raw[fields["messages"]])}
            _check_answered(record["messages"])
        else:
            record = _instruction(raw, fields) | {"output": _output(raw, fields)}
        for field in ("label", "group"):
            if field in fields and (value := _name(field, raw[fields[field]])):
                record[field] = value
        for column in self._keep:
            if column in raw and column not in record:
                try:
                    record[column] = kept_value(raw[column])
                except ValueError as error:
                    raise BadRecord(f"has a column {column!r} that {error}") from None
        return record

    def asked(self, raw: dict[str, Any]) -> Record:
        """A record of which only what is asked matters: its answer may be of any kind, or none. Raises BadRecord."""
        fields = self._fields(raw)
        if self._is_chat(raw, fields, "instruction"):
            messages = _messages(raw[fields["messages"]])
            answer = [] if messages[-1]["role"] == "assistant" else [{"role": "assistant", "content": ""}]
            return {"messages": messages + answer}
        if "instruction" not in fields and "text" in raw:
            fields["instruction"] = "text"
        return _instruction(raw, fields) | {"output": ""}

    def is_record(self, raw: dict[str, Any]) -> bool:
        """Whether an object has the columns of a record, and not records in it."""
        found = {field for field in _USUAL if self._column(field, raw)}
        return "messages" in found or {"instruction", "output"} <= found

    def check_columns(self, where: str, columns: Sequence[str]) -> None:
        """Raises UsageError where a table with these columns cannot give records."""
        for field, column in self._named.items():
            if column not in columns:
                raise _no_column(where, f"{column!r} (for {field})", columns)
        found = {field for field in _USUAL if self._column(field, dict.fromkeys(columns, ""))}
        if "messages" not in found and not {"instruction", "output"} <= found:
            missing = "instruction" if "instruction" not in found else "output"
            raise _no_column(where, f"for {missing}", columns)

    def _fields(self, raw: dict[str, Any]) -> dict[str, str]:
        """The column of every field that the record has."""
        for column in self._named.values():
            if column not in raw:
                raise BadRecord(f"has no column {column!r}")
        found = {field: self._column(field, raw) for field in _USUAL}
        return {field: column for field, column in found.items() if column is not None}

    def _is_chat(self, raw: dict[str, Any], fields: dict[str, str], other: str) -> bool:
        """Whether the record is in its messages: they are named, or there where `other` is not. Of a table that has
        both kinds, either column is null."""
        if "messages" in self._named:
            return True
        given = [field for field in ("messages", other) if field in fields and not _is_missing(raw[fields[field]])]
        return given == ["messages"] or ("messages" in fields and other not in fields)

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


def text_of(record: Record) -> str:
    """Prompt and answer."""
    return f"{prompt_of(record)}\n{answer_of(record)}"


def conversation_of(record: Record) -> list[dict[str, str]]:
    """The record as messages whose last one is the answer."""
    if "messages" in record:
        return list(record["messages"])
    return [{"role": "user", "content": prompt_of(record)}, {"role": "assistant", "content": answer_of(record)}]


def with_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with `change(text)` in place of each of its texts."""
    if "messages" in record:
        messages = [message | {"content": change(message["content"])} for message in record["messages"]]
        return record | {"messages": messages}
    return record | {field: change(record[field]) for field in ("instruction", "input", "output")}


def masked(record: Record, mask: Callable[[str], str]) -> Record:
    """The record with `mask(text)` in place of each text in it, its label's and columns' too; its group is a hash."""
    other = {name: changed(value, mask) for name, value in record.items() if name not in _MASKED_APART}
    group = {"group": hashlib.sha256(record["group"].encode()).hexdigest()[:16]} if "group" in record else {}
    return with_texts(record, mask) | other | group


def _instruction(raw: dict[str, Any], fields: dict[str, str]) -> Record:
    """Instruction and input."""
    record: Record = {"instruction": _required("instruction", raw, fields), "input": ""}
    if "input" in fields and not _is_missing(raw[fields["input"]]):
        record["input"] = _text("input", raw[fields["input"]])
    if not record["instruction"].strip() and not record["input"].strip():
        raise BadRecord("has an empty instruction")
    return record


def _output(raw: dict[str, Any], fields: dict[str, str]) -> str:
    output = _required("output", raw, fields)
    if not output.strip():
        raise BadRecord("has an empty output")
    return output


def _required(field: str, raw: dict[str, Any], fields: dict[str, str]) -> str:
    value = raw[fields[field]] if field in fields else None
    if _is_missing(value):
        raise BadRecord(f"has no {field}" + (f" ({fields[field]} is null)" if field in fields else ""))
    return _text(field, value)


def _is_missing(value: Any) -> bool:
    """Null, or what stands for it where a table has it among numbers: NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _name(field: str, value: Any) -> str:
    """A class or a group as text; "" for none. A whole number is one without ".0": where some are missing, pandas
    writes all of them as floats."""
    if _is_missing(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (dict, list, float, bytes)):
        raise BadRecord(f"has a {field} that is {_kind(value)}, not a text")
    return _text(field, str(value))


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a table holds JSON
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"has messages that are {_kind(value)}, not a list of messages")
    messages = [_message(number, message) for number, message in enumerate(value)]
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise BadRecord("has messages in which no user asks anything")
    return messages


def _check_answered(messages: list[dict[str, str]]) -> None:
    if messages[-1]["role"] != "assistant":
        raise BadRecord(f"ends with the turn of the {messages[-1]['role']}: there is no answer")
    if not messages[-1]["content"].strip():
        raise BadRecord("has an empty answer")


def _message(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRecord(f"has messages[{number}] that is {_kind(message)}, not an object")
    if "from" in message and "role" not in message:  # ShareGPT's form
        message = {"role": _SHAREGPT.get(message["from"], message["from"]), "content": message.get("value")}
    role = message.get("role")
    if role not in ROLES:
        raise BadRecord(f"has messages[{number}] with the role {shown(role)}; known: {', '.join(ROLES)}")
    if any(message.get(key) for key in _CALLS):  # its text alone would teach to say so and call nothing
        raise BadRecord(f"has messages[{number}] that calls tools; only texts are learnt")
    return {"role": role, "content": _content(f"messages[{number}].content", message.get("content"))}


def _content(field: str, value: Any) -> str:
    """A text, or OpenAI's list of parts, of which each is one; joined as the gateway joins them."""
    if isinstance(value, list) and value and all(isinstance(one, dict) and one.get("type") == "text" for one in value):
        return "\n".join(_text(field, one.get("text")) for one in value)
    return _text(field, value)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"has {field} that is {_kind(value)}, not a text")
    try:
        return whole_text(value)
    except ValueError as error:
        raise BadRecord(f"{error} in {field}") from None


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
