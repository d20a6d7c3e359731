"""The parts of the client that need no server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

import stillhouse.client
from stillhouse.client import grpc_wire
from stillhouse.client.address import parse_url
from stillhouse.client.errors import (
    ClientError,
    ConnectionFailed,
    InvalidCall,
    ModelNotFound,
    Overloaded,
    RequestRejected,
    StreamBroken,
    TimedOut,
    Unavailable,
    from_server,
)
from stillhouse.client.grpc_sync import GrpcStream
from stillhouse.client.http_wire import EventReader, read_error, read_reply
from stillhouse.client.request import build_request


@pytest.mark.parametrize(
    ("url", "base_url"),
    [
        ("localhost:8001", "grpc://localhost:8001"),
        ("localhost", "grpc://localhost:8001"),
        ("grpc://10.0.0.1:9", "grpc://10.0.0.1:9"),
        ("grpcs://models.example", "grpcs://models.example:8001"),
        ("[::1]:8001", "grpc://[::1]:8001"),
        ("http://localhost", "http://localhost:8000"),
        ("http://localhost:80/triton/", "http://localhost:80/triton"),
        ("https://models.example", "https://models.example:443"),
    ],
)
def test_the_url_says_the_transport(url: str, base_url: str) -> None:
    assert parse_url(url).base_url == base_url


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host:1", "host:port", "host:99999", "", "grpc://host:1/path", "http://"),
        *("grpc://[::1", "http://[a]:1", "grpc://\u2100"),
    ],
)
def test_a_bad_url_is_refused_with_a_hint(url: str) -> None:
    with pytest.raises(InvalidCall) as caught:
        parse_url(url)
    assert "http://host:port" in (caught.value.hint or "")


@pytest.mark.parametrize("token", [2**31, -1, 1.5, "a", None])
def test_a_token_id_that_the_tensor_cannot_hold_is_refused(token: Any) -> None:
    with pytest.raises(InvalidCall, match="input_ids must be"):
        build_request("m", None, None, [1, token], None, {}, stream=True)
    assert build_request("m", None, None, [0, 2**31 - 1], None, {}, stream=True).inputs["input_ids"] == [0, 2**31 - 1]


@pytest.mark.parametrize(
    ("name", "datatype", "raw"),
    [
        ("num_output_tokens", "UINT32", b"\1"),
        ("text_output", "BYTES", b"\1"),
        ("details", "BYTES", b"\1\0\0\0{"),
        ("details", "BYTES", b"\2\0\0\0{}"),
    ],
)
def test_an_answer_that_cannot_be_read_breaks_its_stream(name: str, datatype: str, raw: bytes) -> None:
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.outputs.add(name=name, datatype=datatype, shape=[1])
    message.infer_response.raw_output_contents.append(raw)
    with pytest.raises(StreamBroken, match="m: the server's answer cannot be read"):
        grpc_wire.read_response(message, build_request("m", "Hi", None, None, None, {}, stream=True))


def test_details_that_are_none_are_refused_over_http() -> None:
    request = build_request("m", "Hi", None, None, None, {}, stream=True, details=True)
    with pytest.raises(RequestRejected, match="details cannot be read"):
        read_reply(b'{"text_output": "a", "details": "{"}', request)


class Strange:
    """A call of grpc's that throws what is none of its errors."""

    def __iter__(self) -> Iterator[Any]:
        raise KeyError("strange")

    def cancel(self) -> None: ...


def test_whatever_the_reading_thread_meets_its_reader_hears_of() -> None:
    stream = GrpcStream(Strange(), build_request("m", "Hi", None, None, None, {}, stream=True), "host:8001")
    with pytest.raises(StreamBroken, match="m: the server's answer cannot be read: KeyError"):
        stream.next(5)
    assert stream.next(5) is None


def test_several_answers_in_one_call_are_refused_for_only_one_would_be_read() -> None:
    with pytest.raises(InvalidCall, match="n must be 1"):
        build_request("m", "Hi", None, None, None, {"n": 2}, stream=True)
    assert build_request("m", "Hi", None, None, None, {"n": 1}, stream=True).stream


@given(
    texts=st.lists(
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1), max_size=6
    ),
    cut=st.integers(1, 9),
    newline=st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_come_out_whole_however_the_body_is_cut(texts: list[str], cut: int, newline: bytes) -> None:
    body = b"".join(b"data: " + text.encode() + newline * 2 for text in texts)
    reader = EventReader()
    events = [event for i in range(0, len(body), cut) for event in reader.feed(body[i : i + cut])]
    assert [event.decode() for event in events] == texts


def test_an_event_joins_its_lines_and_ignores_comments() -> None:
    assert EventReader().feed(b": ping\n\ndata: a\ndata:b\nid: 3\n\ndata: rest\n") == [b"a\nb"]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Request for unknown model: 'x' is not found", ModelNotFound),
        ("Stub process 'support-int4_0' is not healthy.", Unavailable),
        ("queue full: 64 requests are waiting, the queue holds 64", Overloaded),
        ("out of time: no answer within 0.5 s (3 tokens were generated)", TimedOut),
        ("shut down: the model is being unloaded", Unavailable),
        ("internal error: KeyError: 3", Unavailable),
        ("invalid request: unknown sampling parameter 'unknown model: is not ready'", RequestRejected),
        ("Error generating stream: temperature must be in [0, 2]", RequestRejected),
    ],
)
def test_what_triton_says_tells_the_kind(message: str, kind: type[ClientError]) -> None:
    error = from_server(message, "support-int4")
    assert type(error) is kind
    assert str(error).startswith("support-int4: ")


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, b'{"error":"bad"}', RequestRejected, "m: bad"),
        (400, b'data: {"error":"bad event"}\n\n', RequestRejected, "m: bad event"),
        (404, b'{"error":"Request for unknown model"}', ModelNotFound, "unknown model"),
        (404, b"<html>nothing here</html>", RequestRejected, "HTTP status 404: nothing here"),
        (503, b'{"error":"queue is full"}', Unavailable, "queue is full"),
        (502, b"", Unavailable, "HTTP status 502"),
    ],
)
def test_a_status_tells_the_kind(status: int, body: bytes, kind: type[ClientError], words: str) -> None:
    error = read_error(status, body, "m")
    assert type(error) is kind
    assert words in str(error)


def test_of_a_web_page_the_first_line_is_said() -> None:
    page = b"<!DOCTYPE HTML>\n<html>\n<head><style>\np {color: red}\n</style>\n<title>Not &amp; here</title>\n<p>More"
    assert str(read_error(501, page, "m")) == "m: HTTP status 501: Not & here"
    assert str(read_error(502, b"\nno upstream\nat all\n", "m")) == "m: HTTP status 502: no upstream"


def test_every_error_has_the_one_base_and_its_hint() -> None:
    kinds = [getattr(stillhouse.client, name) for name in stillhouse.client.__all__]
    errors = [k for k in kinds if isinstance(k, type) and issubclass(k, Exception)]
    assert len(errors) == 9
    assert all(issubclass(error, ClientError) for error in errors)
    assert ConnectionFailed("x", hint="y").hint == "y"
    for name in stillhouse.client.__all__:
        assert hasattr(stillhouse.client, name)


def test_importing_the_client_loads_no_transport_and_no_runtime() -> None:
    code = (
        "import sys, stillhouse.client as c; c.AsyncClient('http://h:1');"
        "heavy = {'grpc', 'tritonclient', 'numpy', 'aiohttp', 'urllib3', 'onnxruntime', 'torch'};"
        "print(sorted(heavy & set(sys.modules)));"
        "c.Client('http://h:1'); print('grpc' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:2] == ["[]", "False"]


def test_a_server_that_says_unavailable_itself_was_reached() -> None:
    def busy(_: bytes, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining")

    server = grpc.server(ThreadPoolExecutor(1))
    handler = {"ServerReady": grpc.unary_unary_rpc_method_handler(busy)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("inference", handler)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    errors = []
    for _ in range(2):  # asked once while it runs, once when it is gone
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/inference/ServerReady")(b"")
        errors.append(grpc_wire.read_error(caught.value, "host:8001"))
        server.stop(None).wait()
    assert type(errors[0]) is Unavailable and "draining" in str(errors[0])
    assert type(errors[1]) is ConnectionFailed
