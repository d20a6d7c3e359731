"""Sends a hostile request, and waits for whatever comes back."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
from attacks.attack import Attack
from tritonclient.grpc import service_pb2

_PIECES, _PAUSE_S = 16, 0.05
_SERVICE = "/inference.GRPCInferenceService/"
_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]


@dataclass(frozen=True, slots=True)
class Targets:
    """Where the doors of a server are; all on this machine."""

    grpc: str
    http: str
    gateway: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `fault`: what happened instead ("hang", "closed", "left"), else "".

    Of HTTP: status, content type and body; of gRPC the status code's name and text, and the messages before it.
    """

    status: int | str = 0
    kind: str = ""
    body: bytes = b""
    messages: list[Any] = field(default_factory=list)
    fault: str = ""


class Sender:
    """One client, for one thread; a context manager."""

    def __init__(self, targets: Targets, limit_s: float = 40.0) -> None:
        self._targets = targets
        self._limit_s = limit_s
        self._channel = grpc.insecure_channel(targets.grpc.removeprefix("grpc://"), options=_OPTIONS)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def send(self, attack: Attack) -> Reply:
        """Sends it and returns what came back, after `limit_s` at the latest."""
        if attack.door == "grpc":
            return self._call(attack)
        return self._post(attack, self._targets.http if attack.door == "http" else self._targets.gateway)

    def _call(self, attack: Attack) -> Reply:
        messages: list[Any] = []
        path = _SERVICE + attack.path
        try:
            if attack.path == "ModelInfer":
                call = self._channel.unary_unary(path, None, service_pb2.ModelInferResponse.FromString)
                messages.append(call(attack.body, timeout=self._limit_s))
            else:
                stream = self._channel.stream_stream(path, None, service_pb2.ModelStreamInferResponse.FromString)
                messages.extend(stream(iter([attack.body]), timeout=self._limit_s))
        except grpc.RpcError as error:
            code = error.code().name
            fault = "hang" if code == "DEADLINE_EXCEEDED" else ""
            return Reply(code, body=(error.details() or "").encode(), messages=messages, fault=fault)
        return Reply("OK", messages=messages)

    def _post(self, attack: Attack, url: str) -> Reply:
        address = urlsplit(url)
        try:
            connection = socket.create_connection((address.hostname or "", address.port or 0), 10.0)
        except OSError as error:
            return Reply(fault=f"no connection ({error.strerror})")
        with contextlib.closing(connection) as line:
            line.settimeout(self._limit_s)
            try:
                for piece in _pieces(attack):
                    line.sendall(piece)
            except OSError:
                pass  # a server may refuse before it has read all; what it said is still there
            if attack.pace == "half":
                return Reply(fault="left")
            return _answer(line, attack.method)


def _answer(line: socket.socket, method: str) -> Reply:
    try:
        with contextlib.closing(http.client.HTTPResponse(line, method=method)) as response:
            response.begin()
            return Reply(response.status, response.headers.get("Content-Type", ""), response.read())
    except TimeoutError:
        return Reply(fault="hang")
    except (OSError, http.client.HTTPException) as error:
        return Reply(fault=f"closed ({type(error).__name__})")


def _pieces(attack: Attack) -> Iterator[bytes]:
    """The bytes of a request, in the pieces and at the pace that it has."""
    head = b""
    if not attack.frame:
        headers = {"Host": "x", "Connection": "close", **attack.headers, "Content-Length": len(attack.body)}
        lines = [f"{attack.method} {attack.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    if attack.pace == "at once":
        yield head + attack.body
        return
    if attack.door == "http":
        # Triton answers 404 where the path comes in two pieces.
        yield head
        head = b""
    whole = head + attack.body
    size = max(1, len(whole) // _PIECES)
    for start in range(0, len(whole) // (2 if attack.pace == "half" else 1), size):
        yield whole[start : start + size]
        time.sleep(_PAUSE_S)
