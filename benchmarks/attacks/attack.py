"""One hostile request as it is sent, and what sound ones look like at each door.

Three doors: "gateway" (OpenAI's API), "http" (Triton's JSON and binary HTTP), "grpc" (Triton's gRPC, one call a
request). What is sent is bytes, so that anything can be wrong with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from attacks.values import Expected, dumped
from tritonclient.grpc import service_pb2

# How the bytes of an HTTP request go out: in one piece, in small ones with pauses, or half of them and no more.
Pace = Literal["at once", "slowly", "half"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """`path`: that of HTTP, or the name of a gRPC method; `frame`: `body` is all that is sent, no head before it."""

    path: str
    about: str
    body: bytes = b""
    door: str = ""
    kind: str = ""
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: Expected = "either"
    pace: Pace = "at once"
    frame: bool = False


# Makes a request of a kind against a model.
Maker = Callable[[Random, str], Attack]


def told(value: Any) -> str:
    """The value in the few words of a report."""
    return repr(value)[:120]


def posted(path: str, body: Mapping[str, Any] | bytes, about: str, expected: Expected = "either") -> Attack:
    """A POST of JSON."""
    data = body if isinstance(body, bytes) else dumped(body).encode("utf-8", "surrogatepass")
    headers = {"Content-Type": "application/json"}
    return Attack(path=path, about=about, body=data, headers=headers, expected=expected)


def asked(random: Random, model: str, text: str = "Hi") -> tuple[str, dict[str, Any]]:
    """A path of the gateway, and a sound body for it."""
    sound: dict[str, Any] = {"model": model, "max_tokens": random.randint(1, 3), "stream": random.random() < 0.5}
    if random.random() < 0.5:
        return "/v1/chat/completions", {**sound, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**sound, "prompt": text}


def triton(
    door: str,
    model: str,
    prompt: Mapping[str, Any],
    parameters: str | bytes,
    about: str,
    expected: Expected = "either",
    *,
    stream: bool = False,
) -> Attack:
    """A request to Triton: `prompt` has one of text_input and messages (str or bytes) and input_ids (a list)."""
    if door == "grpc":
        message = service_pb2.ModelInferRequest(model_name=model)
        for name, value in prompt.items():
            if isinstance(value, list):
                add_tensor(message, name, "INT32", [len(value)], struct.pack(f"<{len(value)}i", *value))
            else:
                add_text(message, name, value)
        add_text(message, "sampling_parameters", parameters)
        add_tensor(message, "stream", "BOOL", [1], bytes([stream]))
        return rpc(message, about, expected)
    fields = {**prompt, "sampling_parameters": parameters, "exclude_input_in_output": True, "stream": stream}
    pairs = (_json_bytes(name) + b": " + _json_bytes(value) for name, value in fields.items())
    action = "generate_stream" if stream else "generate"
    return posted(f"/v2/models/{model}/{action}", b"{" + b", ".join(pairs) + b"}", about, expected)


def rpc(message: Any, about: str, expected: Expected = "either", method: str = "ModelStreamInfer") -> Attack:
    """A call of Triton's gRPC with one message, or with bytes that stand for one."""
    if not isinstance(message, bytes):
        message.parameters["triton_enable_empty_final_response"].bool_param = True
        message = message.SerializeToString()
    return Attack(path=method, about=about, body=message, expected=expected)


def add_tensor(message: Any, name: str, datatype: str, shape: list[int], raw: bytes) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(raw)


def add_text(message: Any, name: str, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    add_tensor(message, name, "BYTES", [1], struct.pack("<I", len(data)) + data)


def control(door: str, model: str, prompt: str) -> Attack:
    """A good request, whose answer never changes."""
    sound = {"max_tokens": 6, "temperature": 0}
    if door == "gateway":
        made = posted("/v1/completions", {"model": model, "prompt": prompt, **sound}, "control", "answer")
    else:
        made = triton(door, model, {"text_input": prompt}, dumped(sound), "control", "answer")
    return replace(made, door=door, kind="control")


def _json_bytes(value: Any) -> bytes:
    """JSON of a value; bytes are a string's own, whatever they hold."""
    if isinstance(value, bytes):
        return b'"' + value.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    return dumped(value).encode("utf-8", "surrogatepass")
