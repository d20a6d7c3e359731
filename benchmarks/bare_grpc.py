"""gRPC's streamed calls over a bare socket (RFC 9113; gRPC's PROTOCOL-HTTP2): a client that takes next to nothing.

gRPC's own library for Python takes 1.4 ms until a first answer is with who asked (2 slow cores, a model that answers at
once), and of few cores it takes them from the server. One call at a time on a connection, requests of one message of
less than 16 KiB, what is read is not looked into: for measuring, not for use.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER_BYTES = 9
_LARGEST_WINDOW, _FIRST_WINDOW = 2**31 - 1, 2**16 - 1


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
        settings = {SettingsFrame.ENABLE_PUSH: 0, SettingsFrame.INITIAL_WINDOW_SIZE: _LARGEST_WINDOW}
        wider = WindowUpdateFrame(0, window_increment=_LARGEST_WINDOW - _FIRST_WINDOW)
        self._writer.write(_PREFACE + SettingsFrame(settings=settings).serialize() + wider.serialize())

    async def call(self, message: bytes) -> AsyncIterator[bytes]:
        """Sends one message, and gives the data that comes, frame by frame. Raises RuntimeError where it breaks."""
        self._stream += 2
        data = b"\0" + len(message).to_bytes(4, "big") + message
        head = HeadersFrame(self._stream, self._headers, flags=["END_HEADERS"])
        self._writer.write(head.serialize() + DataFrame(self._stream, data, flags=["END_STREAM"]).serialize())
        while True:
            frame = await self._next_frame()
            if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                self._writer.write(SettingsFrame(flags=["ACK"]).serialize())
            if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
                self._writer.write(PingFrame(opaque_data=frame.opaque_data, flags=["ACK"]).serialize())
            if isinstance(frame, RstStreamFrame | GoAwayFrame):
                raise RuntimeError(f"the server ended the stream or its connection: {frame!r}")
            if frame.stream_id != self._stream:
                continue
            if isinstance(frame, DataFrame) and frame.data:
                yield frame.data
            if "END_STREAM" in frame.flags:
                return

    async def _next_frame(self) -> Frame:
        header = await self._reader.readexactly(_FRAME_HEADER_BYTES)
        frame, size = Frame.parse_frame_header(memoryview(header))
        frame.parse_body(memoryview(await self._reader.readexactly(size)))
        return frame
