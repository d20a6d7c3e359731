"""What is asked of a model that makes records up, and when its answer is one: a JSON object of three texts."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"instruction": {"type": "string"}, "input": {"type": "string"}, "output": {"type": "string"}},
    "required": ["instruction", "input", "output"],
    "additionalProperties": False,
}
_THOUGHT = "</think>"
_FENCED = re.compile(r"\A```\w*\n(.*)\n```\Z", re.DOTALL)
_REASON_CHARS = 200


class NoRecord(ValueError):
    """Why an answer is no record, as a phrase that a model understands, too."""


class _Texts(BaseModel):
    """SCHEMA, and what it does not say: something is asked, and something answered."""

    model_config = ConfigDict(extra="forbid", strict=True)

    instruction: str
    input: str
    output: str

    @model_validator(mode="after")
    def _says_something(self) -> _Texts:
        if not (self.instruction.strip() or self.input.strip()):
            raise ValueError("instruction is empty")
        if not self.output.strip():
            raise ValueError("output is empty")
        return self


def request_of(prompt: str, fault: str | None = None) -> str:
    """A prompt with the schema behind it, and, where it is asked again, what was wrong with the answer before.

    That answer itself is left out: cut off at max_tokens, it would fill the context.
    """
    parts = [prompt, f"Answer with one JSON object of this schema and nothing else:\n{json.dumps(SCHEMA)}"]
    parts += [f"The answer before this one was of no use: {fault}. Answer again."] if fault else []
    return "\n\n".join(parts)


def texts_of(answer: str) -> dict[str, str]:
    """Instruction, input and output out of an answer. Raises NoRecord.

    A thought before the object, and Markdown's fence around it, are passed over: models write them unless they are held
    to the schema by their server.
    """
    text = answer.rpartition(_THOUGHT)[2].strip()
    fenced = _FENCED.match(text)
    try:
        return _Texts.model_validate_json(fenced[1] if fenced else text).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise NoRecord((f"{place}: {reason}" if place else reason)[:_REASON_CHARS]) from None
