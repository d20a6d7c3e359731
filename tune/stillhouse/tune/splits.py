"""The splits of a dataset, read for training and evaluation: records that end with the assistant's answer.

A record has `instruction`, `input` (may be empty) and `output`, or `messages` in OpenAI's form, and may have a `weight`
(class weights, as `stillhouse data prepare` writes them); other keys are let be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.engine.directory import sha256_of
from stillhouse.engine.errors import StillhouseError
from stillhouse.tune.raw import why_not_json

SUFFIXES = (".jsonl", ".parquet")
_HINT = 'a line: {"instruction": "…", "input": "", "output": "…"} or {"messages": […]}'

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Split:
    """One file of a dataset: its conversations, each ending with an answer, their weights, and the file's sha256.

    `numbers` are the records' own in the file, from 1 (of JSONL, its lines).
    """

    name: str
    path: Path
    sha256: str
    conversations: list[list[Message]]
    weights: list[float]
    numbers: list[int]


def find_split(folder: Path, name: str) -> Path | None:
    """The file of the split `name` in a dataset's folder, or None; an empty one is none."""
    files = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file() and file.stat().st_size), None)


def read_split(path: Path, name: str) -> Split:
    """The conversations in `path`. Raises StillhouseError that names the first record which is none."""
    conversations, weights, numbers = [], [], []
    for number, record in _records(path):
        numbers.append(number)
        conversations.append(_conversation(record, path, number))
        weights.append(_weight(record, path, number))
    if not conversations:
        raise StillhouseError(f"{name}: {path} has no record", hint=_HINT)
    return Split(name, path, sha256_of(path), conversations, weights, numbers)


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file and their numbers: lines of JSONL, rows of Parquet, from 1."""
    if path.suffix not in SUFFIXES:
        raise StillhouseError(
            f"{path} is neither .jsonl nor .parquet", hint="'stillhouse data prepare' makes a dataset of other forms"
        )
    if path.suffix == ".parquet":
        yield from enumerate(_rows(path), 1)
        return
    try:
        lines = path.read_text("utf-8-sig").split("\n")  # splitlines would also split at U+2028 in a text
    except (OSError, UnicodeDecodeError) as error:
        raise StillhouseError(f"cannot read {path}: {error}", hint="JSONL is UTF-8, a JSON object a line") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StillhouseError(f"{path}: line {number} is not JSON: {why_not_json(error)}", hint=_HINT) from None


def _rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StillhouseError(f"cannot read {path}: {reason}", hint="is the file whole? write it again") from None
    return rows


def _conversation(record: Any, path: Path, number: int) -> list[Message]:
    """A record as messages whose last one is the assistant's answer."""

    def refused(why: str) -> StillhouseError:
        return StillhouseError(f"{path}: record {number} {why}", hint=_HINT)

    if not isinstance(record, dict):
        raise refused("is no JSON object")
    messages = record.get("messages")
    if messages is None:
        instruction, given, output = (record.get(key) or "" for key in ("instruction", "input", "output"))
        if not all(isinstance(text, str) for text in (instruction, given, output)):
            raise refused("has an instruction, input or output that is no text")
        question = f"{instruction}\n\n{given}" if given and instruction else instruction or given
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise refused("has messages that are no list of {role, content}")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise refused("has no answer")
    if not messages[-2]["content"].strip():
        raise refused("has an answer, but nothing is asked")
    return messages


def _weight(record: dict[str, Any], path: Path, number: int) -> float:
    weight = record.get("weight")
    weight = 1.0 if weight is None else weight  # a column of Parquet has nulls where it has nothing
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise StillhouseError(f"{path}: record {number} has a weight that is no number from 0 on", hint=_HINT)
    return float(weight)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
