"""From the bytes of a request to its checked body; whatever is wrong with them is a named 400 (or 413)."""

from __future__ import annotations

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from stillhouse.engine.errors import shown
from stillhouse.engine.neutral import NEUTRAL, is_neutral
from stillhouse.engine.sampling import MAX_BIASES, MAX_STOPS
from stillhouse.gateway.errors import ApiError, invalid
from stillhouse.gateway.memory import trim_soon

MAX_BODY_BYTES = 16 * 2**20
# Between two pieces of a body: whoever sends slower than this holds a connection and nothing else.
_PIECE_TIMEOUT_S = 30.0
_BODY_TIMEOUT_S = 300.0
_LARGE_BYTES = 2**18  # from here on reading the JSON would hold up the other requests: a thread does it
# Of a union of lists, pydantic has a fault for each alternative and each element.
_ALTERNATIVES = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": f"a non-empty string or a list of up to {MAX_STOPS} of them",
}
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

Body = TypeVar("Body", bound=BaseModel)

# One at a time: Python's lock lets no two be read at once, and each may come to hundreds of MB of objects meanwhile.
_large_bodies = ThreadPoolExecutor(1, thread_name_prefix="stillhouse-body")


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The request's body as a `kind`. Raises ApiError, naming the field that is unknown, ill-typed or out of range."""
    data = await _read_bytes(request)
    if len(data) < _LARGE_BYTES:
        return _parse(data, kind)
    trim_soon()
    return await asyncio.get_running_loop().run_in_executor(_large_bodies, _parse, data, kind)


async def _read_bytes(request: Request) -> bytes:
    if (coding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise ApiError(415, f"Content-Encoding {shown(coding)} is not read here: send the body as it is")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    pieces: list[bytes] = []
    size = 0
    stream, begun_s = request.stream().__aiter__(), time.monotonic()
    while True:
        try:
            left_s = begun_s + _BODY_TIMEOUT_S - time.monotonic()
            piece = await asyncio.wait_for(stream.__anext__(), max(0.0, min(_PIECE_TIMEOUT_S, left_s)))
        except StopAsyncIteration:
            return b"".join(pieces)
        except asyncio.TimeoutError:
            close = {"Connection": "close"}
            raise ApiError(408, "the body comes too slowly", code="request_timeout", headers=close) from None
        except ClientDisconnect:
            raise ApiError(499, "the client went away") from None
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        pieces.append(piece)


def _too_large() -> ApiError:
    message = f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def _parse(data: bytes, kind: type[Body]) -> Body:
    fields = _read_json(data)
    if not isinstance(fields, dict):
        raise invalid(f"the body must be a JSON object, got {type(fields).__name__}")
    known = {field.alias or name for name, field in kind.model_fields.items()}
    fields = _without_neutral(fields, known)
    _refuse_many_faults(fields, known)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_fault(error) from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None


def _without_neutral(fields: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`fields` without those that change nothing; `known` are the names that the body itself has.

    Raises ApiError for the first that would change something.
    """
    idle = NEUTRAL.keys() & fields.keys() - known
    for name in sorted(idle):
        if not is_neutral(name, fields[name]):
            values = " or ".join(map(json.dumps, NEUTRAL[name]))
            raise invalid(
                f"{name} is not supported here: leave it out" + (f", or send {values}" if values else ""),
                name,
                "unsupported_parameter",
            )
    return {name: value for name, value in fields.items() if name not in idle} if idle else fields


def _refuse_many_faults(fields: dict[str, Any], known: set[str]) -> None:
    """What pydantic would say too, but once and not for each of a million fields."""
    if unknown := next((name for name, value in fields.items() if name not in known and value is not None), None):
        name = shown(unknown)
        raise invalid(f"unknown field {name} (known: {', '.join(sorted(known))})", unknown[:80], "unknown_field")
    bias = fields.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > MAX_BIASES:
        raise invalid(f"logit_bias must have at most {MAX_BIASES} entries, got {len(bias)}", "logit_bias")


def _read_json(data: bytes) -> Any:
    if not data.strip():
        raise invalid("the body is empty: a JSON object is needed")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"the body must be UTF-8: byte {error.start} is not") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if _HALF_PAIR.search(text):
            # Half a surrogate pair is no character: nothing could be said back in UTF-8.
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise invalid("the body holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body must be JSON: {error}") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first_fault(error: ValidationError) -> ApiError:
    """The fault of an unknown field before others, else the first, as one line."""
    faults = error.errors(include_url=False, include_context=False)
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    # Of a union, pydantic appends the alternative that it tried; that is no part of the field's name.
    place = [str(part) for part in fault["loc"] if not _is_alternative(str(part))]
    name = ".".join(place)
    if fault["type"] == "extra_forbidden":
        return invalid(f"unknown field {name!r}", name, "unknown_field")
    if fault["type"] == "missing":
        return invalid(f"{name} is missing", name)
    if place and place[0] in _ALTERNATIVES:
        return invalid(f"{place[0]} must be {_ALTERNATIVES[place[0]]}, got {shown(faults[0]['input'])}", place[0])
    # A union has a fault for each of its alternatives.
    said = dict.fromkeys(other["msg"] for other in faults if other["loc"][: len(place)] == fault["loc"][: len(place)])
    message = " or ".join(text.removeprefix("Input should ") for text in said)
    return invalid(f"{name} must {message}, got {shown(fault['input'])}", name)


def _is_alternative(part: str) -> bool:
    return part in ("str", "int", "bool", "float") or "[" in part
