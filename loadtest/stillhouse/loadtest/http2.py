"""An HTTP/2 connection (RFC 9113) whose streams belong to greenlets: one greenlet reads, and notes when bytes came.

Frames are hyperframe's, their headers hpack's. A client of many small answers needs little more: its own window is as
large as can be, it sends a request whole as soon as the server's window lets it, and takes no pushes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gevent
from gevent.event import Event
from gevent.lock import RLock
from gevent.queue import Empty, SimpleQueue
from hpack import Decoder, Encoder, HPACKError
from hyperframe.exceptions import HyperframeError
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

Headers = list[tuple[str, str]]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_READ_BYTES = 1 << 16
_FRAME_HEADER_BYTES = 9
_FIRST_WINDOW, _LARGEST_WINDOW = (1 << 16) - 1, (1 << 31) - 1
_LARGEST_FRAME = 1 << 14  # which either may send that was told of no other
_CANCEL = 8


def header_block(headers: Headers) -> bytes:
    """Headers as they are sent; "never indexed", so that they leave no state behind: good for any request."""
    return Encoder().encode([(name, value, True) for name, value in headers])


class Http2Error(Exception):
    """A stream or its connection ended before its time."""


class Arrived(NamedTuple):
    """What came on a stream with one frame."""

    time_s: float  # of time.perf_counter, when it was read
    data: bytes = b""
    headers: Headers | None = None
    ended: bool = False  # the server sends no more


@dataclass(slots=True)
class Stream:
    """One request of a connection; `next` is for the greenlet that sent it."""

    connection: Connection
    number: int
    window: int  # bytes that the server still takes
    arrived: SimpleQueue[Arrived | Http2Error] = field(default_factory=SimpleQueue)
    ended: bool = False

    def next(self, wait_s: float | None) -> Arrived:
        """What came next. Raises TimeoutError after `wait_s`, Http2Error where it broke."""
        try:
            item: Arrived | Http2Error = self.arrived.get(timeout=wait_s)
        except Empty:
            raise TimeoutError from None
        if isinstance(item, Http2Error):
            raise item
        return item

    def cancel(self) -> None:
        """Lets the server know that nobody waits, where it has not ended."""
        if not self.ended:
            self.connection.forget(self)


class Connection:
    """A connection over a socket of gevent's, which it takes over; the greenlets of one thread share it."""

    def __init__(self, sock: Any) -> None:
        self.closed = False
        self._going_away = False  # it takes no further streams
        self._most_streams = _LARGEST_WINDOW
        self._streams: dict[int, Stream] = {}
        self._next_number = 1
        self._decoder = Decoder()
        self._block: HeadersFrame | None = None  # whose continuation is to come
        self._window = self._first_window = _FIRST_WINDOW
        self._room = Event()  # a window has grown, or a stream has ended
        self._unacknowledged = 0
        self._sending = RLock()
        self._socket = sock
        settings = {SettingsFrame.ENABLE_PUSH: 0, SettingsFrame.INITIAL_WINDOW_SIZE: _LARGEST_WINDOW}
        first = SettingsFrame(settings=settings).serialize()
        self._socket.sendall(_PREFACE + first + _widen(_LARGEST_WINDOW - _FIRST_WINDOW))
        self._reader = gevent.spawn(self._read)

    @property
    def has_room(self) -> bool:
        return not self.closed and not self._going_away and len(self._streams) < self._most_streams

    def request(self, block: bytes, body: bytes) -> Stream:
        """Sends a request, its headers as a `header_block`. Raises Http2Error where the connection has ended.

        What the server has no room for yet is sent as soon as it has.
        """
        with self._sending:  # streams begin in the order of their numbers
            if self.closed or self._going_away:
                raise Http2Error("the connection is closed")
            stream = Stream(self, self._next_number, self._first_window)
            self._next_number += 2
            self._streams[stream.number] = stream
            head = HeadersFrame(stream.number, block, flags=["END_HEADERS"]).serialize()
            rest = self._send_body(stream, head, body)
        if rest:
            gevent.spawn(self._send_rest, stream, rest)
        return stream

    def forget(self, stream: Stream) -> None:
        """Cancels a stream."""
        self._end_stream(stream)
        self._send(RstStreamFrame(stream.number, error_code=_CANCEL).serialize())

    def close(self) -> None:
        self._reader.kill()
        self._end("the connection was closed")

    def _send_body(self, stream: Stream, before: bytes, body: bytes) -> bytes:
        """Sends `before`, and of the body what the windows let; what is left of it."""
        frames = [before]
        while body:
            size = min(len(body), _LARGEST_FRAME, stream.window, self._window)
            if size <= 0:
                break
            frame = DataFrame(stream.number, body[:size])
            body = body[size:]
            if not body:
                frame.flags.add("END_STREAM")
            stream.window -= size
            self._window -= size
            frames.append(frame.serialize())
        if data := b"".join(frames):
            self._send(data)
        return body

    def _send_rest(self, stream: Stream, body: bytes) -> None:
        while not stream.ended and (body := self._send_body(stream, b"", body)):
            self._room.clear()
            self._room.wait()

    def _send(self, data: bytes) -> None:
        with self._sending:
            if self.closed:
                return
            try:
                self._socket.sendall(data)
            except OSError:
                self._going_away = True  # the reader learns why, after what came before
            except BaseException:  # the greenlet was killed, maybe in the middle of a frame
                self._end("a frame was cut off")
                raise

    def _read(self) -> None:
        rest = b""
        try:
            while data := self._socket.recv(_READ_BYTES):
                rest = self._take(rest + data if rest else data, time.perf_counter())
            self._end("the server closed the connection")
        except (OSError, HyperframeError, HPACKError) as error:
            self._end(str(error) or type(error).__name__)

    def _take(self, data: bytes, time_s: float) -> bytes:
        """Handles the whole frames in `data`; the beginning of the next is left."""
        view, at = memoryview(data), 0
        while len(data) - at >= _FRAME_HEADER_BYTES:
            begin = at + _FRAME_HEADER_BYTES
            frame, size = Frame.parse_frame_header(view[at:begin])
            if size > _LARGEST_FRAME:
                raise HyperframeError("what came is not HTTP/2")
            if len(data) - begin < size:
                break
            at = begin + size
            frame.parse_body(view[begin:at])
            handle = _HANDLERS.get(type(frame))
            if handle is not None:
                handle(self, frame, time_s)
        return data[at:]

    def _take_data(self, frame: Any, time_s: float) -> None:
        self._unacknowledged += frame.flow_controlled_length
        if self._unacknowledged > _LARGEST_WINDOW // 2:
            self._answer(_widen(self._unacknowledged))
            self._unacknowledged = 0
        self._bring(frame, Arrived(time_s, data=frame.data, ended="END_STREAM" in frame.flags))

    def _take_headers(self, frame: Any, time_s: float) -> None:
        """A block of headers, which may go on in further frames."""
        if isinstance(frame, HeadersFrame):
            self._block = frame
        elif self._block is not None:
            self._block.data += frame.data
        if self._block is None or "END_HEADERS" not in frame.flags:
            return
        block, self._block = self._block, None
        headers = [(str(name), str(value)) for name, value in self._decoder.decode(block.data)]
        self._bring(block, Arrived(time_s, headers=headers, ended="END_STREAM" in block.flags))

    def _take_settings(self, frame: Any, _time_s: float) -> None:
        if "ACK" not in frame.flags:
            gevent.spawn(self._obey, frame.settings)

    def _obey(self, settings: dict[int, int]) -> None:
        """Takes up a server's settings, once it is told so: from then on they bind it too."""
        self._send(SettingsFrame(flags=["ACK"]).serialize())
        self._most_streams = settings.get(SettingsFrame.MAX_CONCURRENT_STREAMS, self._most_streams)
        grown = settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self._first_window) - self._first_window
        self._first_window += grown
        for stream in self._streams.values():
            stream.window += grown
        self._room.set()

    def _take_window(self, frame: Any, _time_s: float) -> None:
        if frame.stream_id == 0:
            self._window += frame.window_increment
        elif frame.stream_id in self._streams:
            self._streams[frame.stream_id].window += frame.window_increment
        self._room.set()

    def _take_ping(self, frame: Any, _time_s: float) -> None:
        if "ACK" not in frame.flags:
            self._answer(PingFrame(opaque_data=frame.opaque_data, flags=["ACK"]).serialize())

    def _take_reset(self, frame: Any, _time_s: float) -> None:
        if frame.stream_id in self._streams:
            self._fail(self._streams[frame.stream_id], f"the server reset the stream (HTTP/2 error {frame.error_code})")

    def _take_goaway(self, frame: Any, _time_s: float) -> None:
        """The server takes no new streams; those that it has it ends."""
        self._going_away = True
        for stream in [one for number, one in self._streams.items() if number > frame.last_stream_id]:
            self._fail(stream, "the server is going away")

    def _bring(self, frame: Any, arrived: Arrived) -> None:
        stream = self._streams.get(frame.stream_id)
        if stream is None:
            return  # cancelled before
        if arrived.ended:
            self._end_stream(stream)
        stream.arrived.put(arrived)

    def _answer(self, data: bytes) -> None:
        # Not by the reader itself: a server that waits for it to read would never read.
        gevent.spawn(self._send, data)

    def _fail(self, stream: Stream, why: str) -> None:
        self._end_stream(stream)
        stream.arrived.put(Http2Error(why))

    def _end_stream(self, stream: Stream) -> None:
        stream.ended = True
        self._streams.pop(stream.number, None)
        self._room.set()

    def _end(self, why: str) -> None:
        self.closed = True
        for stream in list(self._streams.values()):
            self._fail(stream, why)
        self._socket.close()


def _widen(size: int) -> bytes:
    """Lets the server send so many bytes more over all streams."""
    return WindowUpdateFrame(0, window_increment=size).serialize()


_HANDLERS: dict[type[Frame], Callable[[Connection, Any, float], None]] = {
    DataFrame: Connection._take_data,
    HeadersFrame: Connection._take_headers,
    ContinuationFrame: Connection._take_headers,
    SettingsFrame: Connection._take_settings,
    WindowUpdateFrame: Connection._take_window,
    PingFrame: Connection._take_ping,
    RstStreamFrame: Connection._take_reset,
    GoAwayFrame: Connection._take_goaway,
}
