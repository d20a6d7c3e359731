"""Triton's gRPC messages: writing requests, reading responses and errors. Shared by both gRPC transports.

Layout of raw tensors: KServe v2 "binary tensor data" (BYTES: each element after its length, uint32 little-endian).
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Iterable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from stillhouse.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidCall,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Unavailable,
    from_server,
)
from stillhouse.client.request import reply_from
from stillhouse.client.types import ModelEntry, Reply, Request

# Errors inside a stream come as bare text. With the metadata triton_grpc_error=true they would carry a status code, but
# Triton 2.51 dies of it (signal 11) a request or two later: it must not be sent.

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A server that was started again is found again at once, and one client's failures are not another's.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 300),
    ("grpc.use_local_subchannel_pool", 1),
)

# A stream that is cancelled between its last response and its status is kept by Triton for ever, and the descriptor of
# its connection with it (mended in 25.04, triton-inference-server/server#8078). So it runs out, for so long at most.
END_S = 1.0

# struct formats by Triton data type
_NUMBERS = {"FP32": "<f", "UINT32": "<I", "INT32": "<i", "INT64": "<q", "UINT64": "<Q", "FP64": "<d"}


def write_request(request: Request) -> Any:
    """The ModelInferRequest of one request."""
    message = service_pb2.ModelInferRequest(model_name=request.model, model_version=request.version)
    for name, value in request.inputs.items():
        if isinstance(value, bool):
            datatype, size, raw = "BOOL", 1, bytes([value])
        elif isinstance(value, str):
            data = value.encode()
            datatype, size, raw = "BYTES", 1, struct.pack("<I", len(data)) + data
        else:
            datatype, size, raw = "INT32", len(value), struct.pack(f"<{len(value)}i", *value)
        message.inputs.add(name=name, datatype=datatype, shape=[size])
        message.raw_input_contents.append(raw)
    # The empty last response tells the end of a decoupled model's answer.
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def read_response(message: Any, request: Request, received_s: float | None = None) -> list[Reply]:
    """The replies in one ModelStreamInferResponse: its outputs, and the end marker.

    `received_s` is when it came, of time.perf_counter; by default now. Raises ClientError where the response is an
    error that came as text, or cannot be read.
    """
    if received_s is None:
        received_s = time.perf_counter()
    if message.error_message:
        raise from_server(message.error_message, request.model)
    response = message.infer_response
    replies = []
    if response.outputs:
        pairs = zip(response.outputs, response.raw_output_contents, strict=False)
        try:
            values = {output.name: _first(output.datatype, raw) for output, raw in pairs}
            replies.append(reply_from(values, received_s))
        except (struct.error, ValueError, LookupError, TypeError) as error:
            raise unreadable(request.model, error) from None
    if response.parameters["triton_final_response"].bool_param:
        replies.append(Reply("", None, None, None, None, received_s, ends=True))
    return replies


def is_last(replies: Iterable[Reply]) -> bool:
    """Whether one of them is the answer's last: only the stream's own end follows."""
    return any(reply.ends or reply.finish_reason is not None for reply in replies)


def _first(datatype: str, raw: bytes) -> str | float | None:
    """The first element of a raw tensor; None for an empty one, or a type that no output of ours has."""
    if not raw:
        return None
    if datatype == "BYTES":
        (length,) = struct.unpack_from("<I", raw)
        return raw[4 : 4 + length].decode("utf-8", errors="replace")
    if datatype not in _NUMBERS:
        return None
    number: float = struct.unpack_from(_NUMBERS[datatype], raw)[0]
    return number


def read_index(response: Any) -> list[ModelEntry]:
    return [ModelEntry(m.name, m.version, m.state, m.reason) for m in response.models]


def read_error(error: Any, authority: str, model: str | None = None) -> ClientError:
    """The client's error for a grpc.RpcError."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.CANCELLED:
        return closed_meanwhile(authority)
    if code is grpc.StatusCode.UNAVAILABLE and _OF_THE_LINE.search(details):
        return cannot_reach(authority, details.rsplit(": ", 1)[-1])  # the innermost reason
    return error_of(code, details, authority, model)


def error_of(code: Any, details: str, authority: str, model: str | None = None) -> ClientError:
    """The client's error for a status that a server sent, a grpc.StatusCode with its text."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"{authority}: no answer in time", hint="raise timeout_s, or look at the server's log")
    return from_server(details or code.name, model or authority, _KINDS.get(code, Unavailable))


def unreadable(model: str, error: Exception) -> StreamBroken:
    return StreamBroken(f"{model}: the server's answer cannot be read: {error!r}")


def closed(authority: str) -> InvalidCall:
    return InvalidCall(f"the client of {authority} is closed", hint="make another, or close it later")


def closed_meanwhile(authority: str) -> ConnectionFailed:
    return ConnectionFailed(f"{authority}: the connection was closed before the answer came")


def cannot_reach(authority: str, reason: str) -> ConnectionFailed:
    return ConnectionFailed(
        f"cannot reach {authority}: {reason}",
        hint="is the server started, and is this its gRPC port (8001 by default)?",
    )


# gRPC's own words where it has no answer of a server: since 1.8x nothing else tells the two apart.
_OF_THE_LINE = re.compile(
    r"\bconnect|socket|\bdns\b|name resolution|goaway|keepalive|broken pipe|reset by peer|transport|stream removed"
    r"|endpoint|handshake|certificate|\bping timeout",
    re.IGNORECASE,
)
_KINDS: dict[Any, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestRejected,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNIMPLEMENTED: RequestRejected,
    grpc.StatusCode.FAILED_PRECONDITION: RequestRejected,
    grpc.StatusCode.OUT_OF_RANGE: RequestRejected,
    grpc.StatusCode.ALREADY_EXISTS: RequestRejected,
}
