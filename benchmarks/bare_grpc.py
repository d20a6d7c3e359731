"""gRPC's streamed calls over a bare socket (RFC 9113; gRPC's PROTOCOL-HTTP2): a client that takes next to nothing.

gRPC's own library for Python takes 1.4 ms until a first answer is with who asked (2 slow cores, a model that answers at
once), and of few cores it takes them from the server. One call at a time on a connection, requests of one message of
less than 16 KiB, what is read is not looked into: for measuring, not for use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hpack import Encoder

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_LARGEST_WINDOW, _FIRST_WINDOW = 2**31 - 1, 2**16 - 1
_ENABLE_PUSH, _INITIAL_WINDOW_SIZE = 2, 4


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return b"%b%c%c%b%b" % (len(payload).to_bytes(3, "big"), kind, flags, stream.to_bytes(4, "big"), payload)


class Connection:
    """A connection to `host:port` whose calls are all of one method."""

    def __init__(self, address: str, method: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        headers = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", address)]
        headers += [("te", "trailers"), ("content-type", "application/grpc")]
        # Never indexed: they leave no state behind and are the same for every call.
        self._headers = Encoder().encode([(name, value, True) for name, value in headers])
        self._stream = -1

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        settings = ((_ENABLE_PUSH, 0), (_INITIAL_WINDOW_SIZE, _LARGEST_WINDOW))
        payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in settings)
        wider = (_LARGEST_WINDOW - _FIRST_WINDOW).to_bytes(4, "big")
        self._writer.write(_PREFACE + _frame(_SETTINGS, 0, 0, payload) + _frame(_WINDOW_UPDATE, 0, 0, wider))

    async def call(self, message: bytes) -> AsyncIterator[bytes]:
        """Sends one message, and gives the data that comes, frame by frame. Raises RuntimeError where it breaks."""
        self._stream += 2
        data = b"\0" + len(message).to_bytes(4, "big") + message
        self._writer.write(
            _frame(_HEADERS, _END_HEADERS, self._stream, self._headers) + _frame(_DATA, _END_STREAM, self._stream, data)
        )
        while True:
            head = await self._reader.readexactly(9)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._writer.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            if kind in (_RST_STREAM, _GOAWAY):
                raise RuntimeError(f"the server ended the stream or its connection: {payload!r}")
            if stream == self._stream and kind == _DATA and payload:
                yield payload
            if stream == self._stream and kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                return
