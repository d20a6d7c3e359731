"""gRPC as the load test's users speak it: frames on a socket, read by a greenlet."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import gevent
import gevent.server
import gevent.socket
import pytest
from hpack import Encoder
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

from stillhouse.client import (
    Client,
    ConnectionFailed,
    ModelNotFound,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Unavailable,
)
from stillhouse.client.address import parse_url
from stillhouse.loadtest.grpc_gevent import GreenletTransport
from stillhouse.loadtest.http2 import Connection, Http2Error, header_block

MODEL = "support-int4"
REQUEST = header_block([(":method", "POST"), (":path", "/")])


def client_of(host: str, **options: Any) -> Client:
    return Client(host, transport=GreenletTransport(parse_url(host), 10.0), **options)


@pytest.fixture
def client(shared_server: Any) -> Iterator[Client]:
    with client_of(shared_server.grpc_host, token_timeout_s=0.4) as client:
        yield client


def ask(client: Client, **plan: Any) -> list[str]:
    return [token.text for token in client.stream(MODEL, json.dumps(plan), max_tokens=64)]


def test_answers_come_side_by_side_each_token_at_its_time(client: Client) -> None:
    slow = gevent.spawn(ask, client, stall_after=1, first_s=0.01)
    begun_s = time.perf_counter()
    asking = [gevent.spawn(lambda: list(client.stream(MODEL, "Hello", max_tokens=5))) for _ in range(20)]
    answers = [one.get() for one in asking]
    assert time.perf_counter() - begun_s < 2  # not twenty times 0.28 s
    assert not slow.ready()
    for answer in answers:
        assert "".join(token.text for token in answer) == "word0 word1 word2 word3 word4 "
        times_s = [token.time_s for token in answer]
        assert times_s[0] >= 0.2 and times_s[-1] >= 0.28 and times_s == sorted(times_s)
        assert answer[-1].num_output_tokens == 5 and answer[-1].finish_reason == "stop"


def test_a_token_s_time_is_when_it_came_not_when_its_greenlet_woke(client: Client) -> None:
    tokens = client.stream(MODEL, json.dumps({"first_s": 0.05, "gap_s": 0.01, "tokens": 10}))
    first = next(tokens)
    gevent.sleep(0.5)  # the reading greenlet goes on
    last = list(tokens)[-1]
    assert last.time_s - first.time_s < 0.4


def test_messages_longer_than_frames_and_windows_come_whole_both_ways(client: Client) -> None:
    text = "x" * 300_000
    asking = [gevent.spawn(ask, client, echo=True, tokens=2, first_s=0, filler=text) for _ in range(4)]
    for one in asking:
        assert text in json.loads(json.loads(one.get()[0])["text_input"])["filler"]


def test_a_killed_greenlet_cancels_its_request_on_the_server(client: Client, shared_server: Any) -> None:
    waiting = gevent.spawn(ask, client, tokens=500, gap_s=0.02, first_s=0, mark="killed")
    gevent.sleep(0.2)
    waiting.kill()

    def sent() -> int:
        (entry,) = [one for one in shared_server.log() if '"killed"' in one["inputs"]["text_input"]]
        assert entry["ended"] == "cancelled"
        return int(entry["sent"])

    gevent.sleep(0.3)
    before = sent()
    gevent.sleep(0.2)
    assert sent() == before < 30
    assert ask(client, tokens=2, first_s=0) == ["word0 ", "word1 "]  # the connection is none the worse


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        ({"error_after": 0}, RequestRejected),
        ({"error_after": 2}, StreamBroken),
        ({"end_after": 2}, StreamBroken),
        ({"stall_after": 1}, TimedOut),
    ],
)
def test_an_error_has_the_class_that_the_client_gives_it(
    client: Client, shared_server: Any, plan: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as ours:
        ask(client, first_s=0.01, **plan)
    with Client(shared_server.grpc_host, token_timeout_s=0.4) as plain, pytest.raises(error) as theirs:
        ask(plain, first_s=0.01, **plan)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))


def test_a_status_that_the_server_itself_sent_is_not_taken_for_a_lost_connection(client: Client) -> None:
    with pytest.raises(Unavailable, match=f"{MODEL}: Socket closed"):
        ask(client, first_s=0.01, break_after=0)
    with pytest.raises(StreamBroken, match=r"after 2 tokens: .* Socket closed"):
        ask(client, first_s=0.01, break_after=2)


def test_an_unknown_model_is_named(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        list(client.stream("nobody", "Hello"))
    assert not client.ready("nobody") and client.ready(MODEL) and client.ready()
    assert {entry.name for entry in client.models()} == {"support-fp16", MODEL}


def test_nobody_listening_is_said_to_all_who_ask_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        client = client_of(host)
        asking = [gevent.spawn(ask, client) for _ in range(5)]
        gevent.joinall(asking, timeout=10)
        assert all(isinstance(one.exception, ConnectionFailed) for one in asking)
        assert str(asking[0].exception) == f"cannot reach {host}: Connection refused"
        assert not client.ready()


def test_a_server_that_dies_breaks_the_streams_and_one_that_comes_back_is_found(server: Any) -> None:
    client = client_of(server.grpc_host)
    asking = [gevent.spawn(ask, client, tokens=1000, first_s=0) for _ in range(3)]
    gevent.sleep(0.2)
    server.kill()
    gevent.joinall(asking, timeout=10)
    assert all(isinstance(one.exception, StreamBroken) for one in asking)
    with pytest.raises(ConnectionFailed):
        ask(client)
    again = gevent.server.StreamServer(("127.0.0.1", server.grpc_port), lambda sock, _: Peer(sock).refuse())
    again.start()
    try:
        with pytest.raises(Unavailable, match="as said"):
            ask(client)
    finally:
        again.stop()


class Peer:
    """The other end of a connection, frame by frame."""

    def __init__(self, sock: Any, settings: dict[int, int] | None = None) -> None:
        self.sock = sock
        self.encoder = Encoder()
        self.file = sock.makefile("rb")
        assert self.file.read(24).startswith(b"PRI * HTTP/2.0")
        self.send(SettingsFrame(settings=settings or {}))

    def send(self, *frames: Frame) -> None:
        self.sock.sendall(b"".join(frame.serialize() for frame in frames))

    def next(self, kind: type[Frame]) -> Any:
        """The next frame of a kind."""
        while True:
            frame, size = Frame.parse_frame_header(memoryview(self.file.read(9)))
            frame.parse_body(memoryview(self.file.read(size)))
            if isinstance(frame, kind):
                return frame

    def refuse(self) -> None:
        """A status alone, as of a server that is not ready."""
        number = self.next(HeadersFrame).stream_id
        trailers = [(":status", "200"), ("grpc-status", "14"), ("grpc-message", "as%20said")]
        self.send(HeadersFrame(number, self.encoder.encode(trailers), flags=["END_HEADERS", "END_STREAM"]))
        gevent.sleep(1)


def connected(settings: dict[int, int] | None = None) -> tuple[Connection, Peer]:
    """A connection and its other end, once the settings of both are known to both."""
    ours, theirs = gevent.socket.socketpair()
    connection, peer = Connection(ours), Peer(theirs, settings)
    while "ACK" not in peer.next(SettingsFrame).flags:
        pass
    return connection, peer


def test_streams_that_a_server_still_has_end_well_after_its_goaway() -> None:
    connection, peer = connected()
    kept, refused = (connection.request(REQUEST, b"?") for _ in range(2))
    peer.send(GoAwayFrame(last_stream_id=kept.number), DataFrame(kept.number, b"to the end", flags=["END_STREAM"]))
    with pytest.raises(Http2Error, match="going away"):
        refused.next(5)
    arrived = kept.next(5)
    assert arrived.data == b"to the end" and arrived.ended
    assert not connection.has_room
    with pytest.raises(Http2Error):
        connection.request(REQUEST, b"?")


def test_a_body_is_sent_as_the_servers_windows_let_it() -> None:
    connection, peer = connected({SettingsFrame.INITIAL_WINDOW_SIZE: 10})
    stream = connection.request(REQUEST, b"a" * 25)
    first = peer.next(DataFrame)
    assert first.data == b"a" * 10 and not first.flags
    peer.send(WindowUpdateFrame(first.stream_id, window_increment=12))
    assert peer.next(DataFrame).data == b"a" * 12
    peer.send(SettingsFrame(settings={SettingsFrame.INITIAL_WINDOW_SIZE: 20}))
    last = peer.next(DataFrame)
    assert last.data == b"a" * 3 and "END_STREAM" in last.flags
    assert stream.number == first.stream_id == last.stream_id


def test_headers_in_several_frames_padding_and_pings_are_understood() -> None:
    connection, peer = connected()
    stream = connection.request(REQUEST, b"?")
    block = peer.encoder.encode([(":status", "200"), ("content-type", "application/grpc")])
    peer.send(
        HeadersFrame(stream.number, block[:3]),
        ContinuationFrame(stream.number, block[3:], flags=["END_HEADERS"]),
        PingFrame(opaque_data=b"12345678"),
        DataFrame(stream.number, b"data", pad_length=7, flags=["PADDED"]),
        RstStreamFrame(stream.number, error_code=2),
    )
    assert stream.next(5).headers == [(":status", "200"), ("content-type", "application/grpc")]
    assert stream.next(5).data == b"data"
    with pytest.raises(Http2Error, match="error 2"):
        stream.next(5)
    pong = peer.next(PingFrame)
    assert pong.opaque_data == b"12345678" and "ACK" in pong.flags


def test_a_connection_has_room_for_as_many_streams_as_its_server_lets_in() -> None:
    connection, peer = connected({SettingsFrame.MAX_CONCURRENT_STREAMS: 2})
    streams = [connection.request(REQUEST, b"?") for _ in range(2)]
    assert not connection.has_room
    streams[0].cancel()
    assert peer.next(RstStreamFrame).stream_id == streams[0].number
    assert connection.has_room


def test_what_speaks_no_http2_breaks_the_stream_at_once() -> None:
    connection, peer = connected()
    stream = connection.request(REQUEST, b"?")
    peer.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(Http2Error, match="not HTTP/2"):
        stream.next(5)
