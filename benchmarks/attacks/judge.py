"""Tells a sound answer and a clear error from what must not come back."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, NamedTuple

from attacks.attack import Attack
from attacks.wire import Reply

Outcome = Literal["answer", "refusal", "left", "bad"]
# What a client has no business to read: traces, classes, addresses, names of our modules.
_INTERNAL = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|0x[0-9a-f]{6,}|object at|[Ii]nternal error|pydantic|stillhouse\.|panicked"
    r"|(?:Type|Key|Value|Attribute|Index|Recursion|Unicode\w*|Runtime|Assertion|Overflow)Error|Exception"
    r"|shared memory pool"
)
_LONGEST = 1500  # of a message, in characters
_REFUSING_CODES = ("INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED")
# What Triton's own HTTP and gRPC answer before any of it reaches a model: their words and statuses are theirs.
_FRAMING = ("broken frames", "wrong paths and methods")
_TRITONS = re.compile(r"(?:[Uu]nable|[Ff]ailed) to parse|doesn't support models with decoupled|attempt to access JSON")


class Verdict(NamedTuple):
    """`said`: the answer, the error's message, or what is bad about what came."""

    outcome: Outcome
    said: str


def judge(attack: Attack, reply: Reply) -> Verdict:
    """What came back, held against what may."""
    verdict = _judge(attack, reply)
    if attack.expected == "refusal" and verdict.outcome == "answer":
        return Verdict("bad", f"it was answered: {verdict.said[:100]}")
    if attack.expected == "answer" and verdict.outcome == "refusal":
        return Verdict("bad", f"it was refused: {verdict.said[:300]}")
    return verdict


def _judge(attack: Attack, reply: Reply) -> Verdict:
    if reply.fault == "left":
        return Verdict("left", "")
    if reply.fault.startswith("closed") and (attack.frame or (attack.door == "http" and attack.kind in _FRAMING)):
        return Verdict("refusal", "the connection was closed")
    if reply.fault:
        return Verdict("bad", reply.fault)
    try:
        return _judge_rpc(attack, reply) if attack.door == "grpc" else _judge_http(attack, reply)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return Verdict("bad", f"garbage ({type(error).__name__} {error}): {reply.status} {reply.body[:200]!r}")


def _judge_rpc(attack: Attack, reply: Reply) -> Verdict:
    if reply.status != "OK":
        if reply.status not in _REFUSING_CODES and attack.kind not in _FRAMING:
            return Verdict("bad", f"{reply.status}: {reply.body.decode()[:300]}")
        return _refusal(attack, reply.body.decode())
    said = [message.error_message for message in reply.messages if message.error_message]
    if said:
        return _refusal(attack, said[0])
    texts = [
        raw[4:].decode()
        for message in reply.messages
        for output, raw in zip(message.infer_response.outputs, message.infer_response.raw_output_contents, strict=True)
        if output.name == "text_output"
    ]
    if not texts and attack.kind in _FRAMING:
        return Verdict("refusal", "the call was ended")
    if not texts:
        return Verdict("bad", "the call ended without an answer")
    return Verdict("answer", "".join(texts))


def _judge_http(attack: Attack, reply: Reply) -> Verdict:
    status = int(reply.status)
    if status >= 400:
        said = _error_of(attack, reply)
        if status >= 500 and not (attack.door == "http" and (attack.kind in _FRAMING or _TRITONS.search(said))):
            return Verdict("bad", f"{status}: {said[:300]}")
        return _refusal(attack, said)
    if status != 200:
        return Verdict("bad", f"status {status}")
    if reply.kind.startswith("text/event-stream"):
        return _judge_events(attack, reply.body.decode())
    path = attack.path.partition("?")[0]
    if path.endswith(("completions", "tokenize", "generate", "infer")) and attack.method == "POST":
        answer = json.loads(reply.body)
        return _refusal(attack, answer["error"]) if "error" in answer else Verdict("answer", _text_of(answer))
    return Verdict("answer", reply.body[:40].decode())


def _judge_events(attack: Attack, text: str) -> Verdict:
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    if attack.door == "gateway" and (not data or data.pop() != "[DONE]"):
        return Verdict("bad", f"a stream without [DONE]: {text[-200:]}")
    events = [json.loads(item) for item in data]
    errors = [event["error"] for event in events if "error" in event]
    if errors:
        said = errors[0]["message"] if isinstance(errors[0], dict) else errors[0]
        if isinstance(errors[0], dict) and errors[0]["type"] == "server_error":
            return Verdict("bad", f"an event: {said}")
        return _refusal(attack, said)
    if not events:
        return Verdict("bad", "a stream without an event")
    return Verdict("answer", "".join(map(_text_of, events)))


def _text_of(answer: dict[str, Any]) -> str:
    """The text of an answer or of an event. Raises KeyError or TypeError for what is none."""
    if "text_output" in answer:
        return str(answer["text_output"])
    if "tokens" in answer:
        return str(answer["tokens"][: answer["count"]])
    if "prompt" in answer:
        return str(answer["prompt"])
    texts = []
    for choice in answer["choices"]:
        part = choice.get("message") or choice.get("delta") or choice
        if choice["finish_reason"] not in (None, "stop", "length"):
            raise ValueError(f"finish_reason {choice['finish_reason']}")
        texts.append(part.get("content", part.get("text", "")))
    return "".join(text or "" for text in texts)


def _error_of(attack: Attack, reply: Reply) -> str:
    """The message of an HTTP error."""
    text = reply.body.decode("utf-8", "replace")
    if attack.door == "gateway":
        error = json.loads(text)["error"]
        if set(error) != {"message", "type", "param", "code"}:
            raise KeyError("message, type, param, code")
        return str(error["message"])
    try:
        return str(json.loads(text.removeprefix("data: "))["error"])
    except ValueError:
        if attack.kind in _FRAMING:
            return "HTTP's own error"
        raise


def _refusal(attack: Attack, message: str) -> Verdict:
    """Whether an error's message is clear: one line, of a length that one reads, without anything internal."""
    if not message.strip():
        if attack.kind in _FRAMING:
            return Verdict("refusal", "")
        return Verdict("bad", "an error without a message")
    if len(message) > _LONGEST and not (attack.kind in _FRAMING and attack.door != "gateway"):
        return Verdict("bad", f"a message of {len(message)} characters: {message[:200]}")
    if "\n" in message.strip():
        return Verdict("bad", f"a message of several lines: {message[:300]}")
    if found := _INTERNAL.search(message):
        return Verdict("bad", f"{found[0]!r} in: {message[:300]}")
    return Verdict("refusal", message)
