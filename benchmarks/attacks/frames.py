"""What can be wrong around the fields: tensors, protobuf, paths, HTTP's framing, and the pace of a body."""

from __future__ import annotations

import struct
from dataclasses import replace
from random import Random
from typing import Any

from attacks.attack import Attack, Maker, Pace, add_tensor, add_text, asked, posted, rpc, told, triton
from attacks.values import NAN
from tritonclient.grpc import service_pb2


def makers_of(door: str) -> dict[str, Maker]:
    """The makers by kind."""
    if door == "grpc":
        return {"wrong shapes": _grpc_shapes, "broken frames": _grpc_bytes, "wrong paths and methods": _grpc_names}
    paths = _gateway_paths if door == "gateway" else _triton_paths
    makers: dict[str, Maker] = {
        "broken frames": lambda random, model: _frame(door, random, model),
        "wrong paths and methods": paths,
        "slow bodies": lambda random, model: _slow(door, random, model),
    }
    return makers if door == "gateway" else {"wrong shapes": _http_shapes, "binary tensors": _http_binary, **makers}


# Triton over gRPC

_TEXT = struct.pack("<I", 2) + b"Hi"
_TENSORS: tuple[tuple[str, str, list[int], bytes], ...] = (
    *(
        ("text_input", "BYTES", shape, _TEXT)
        for shape in ([], [0], [2], [-1], [1, 1], [2**62, 4], [-(2**63)], [1] * 40)
    ),
    *(("text_input", kind, [1], _TEXT) for kind in ("FP32", "INT64", "", "BANANA", "bytes", "BOOL")),
    *(("text_input", "BYTES", [1], raw) for raw in (b"", b"\x02", struct.pack("<I", 2**32 - 1) + b"Hi", _TEXT + b"x")),
    ("text_input", "BYTES", [2], _TEXT + _TEXT),
    ("text_input", "BYTES", [1], struct.pack("<I", 0)),
    *(("input_ids", "INT32", [1], struct.pack("<i", number)) for number in (-1, 2**31 - 1, -(2**31), 49_152)),
    *(("input_ids", "INT32", shape, b"\x01\0\0\0") for shape in ([2], [0], [], [1, 1], [2**40])),
    ("input_ids", "INT64", [1], bytes(8)),
    ("input_ids", "FP32", [1], struct.pack("<f", NAN)),
)
# Beside a sound text: what flags must not be, and tensors that nobody asked for.
_OTHERS: tuple[tuple[str, str, list[int], bytes], ...] = (
    *(("stream", "BOOL", [size], b"\1" * size) for size in (0, 2)),
    ("stream", "BYTES", [1], struct.pack("<I", 4) + b"true"),
    ("return_logprobs", "INT32", [1], b"\1\0\0\0"),
    ("nobody", "BYTES", [1], _TEXT),
    ("text_input", "BYTES", [1], _TEXT),
    ("input_ids", "INT32", [1], b"\1\0\0\0"),
    ("sampling_parameters", "BYTES", [2], struct.pack("<I", 2) + b"{}" + struct.pack("<I", 2) + b"{}"),
)


def _grpc_shapes(random: Random, model: str) -> Attack:
    message = service_pb2.ModelInferRequest(model_name=model)
    if random.random() < 0.6:
        wrong = random.choice(_TENSORS)
    else:
        add_text(message, "text_input", "Hi")
        wrong = random.choice(_OTHERS)
    add_tensor(message, *wrong)
    if random.random() < 0.15:
        message.raw_input_contents.append(b"\0" * random.choice((1, 10_000)))
    return rpc(message, told(wrong), "refusal")


def _grpc_names(random: Random, model: str) -> Attack:
    """Names, versions, parameters and outputs of a request, and calls that are not for this model."""
    message = service_pb2.ModelInferRequest(model_name=model)
    add_text(message, "text_input", "Hi")
    add_text(message, "sampling_parameters", '{"max_tokens": 1}')
    which = random.randrange(6)
    if which == 0:
        message.model_name = random.choice(("", "nobody", "../" * 20, "x" * 100_000, "support\x00", "👻"))
    elif which == 1:
        message.model_version = random.choice(("-1", "abc", "99", "9" * 400, "\x00"))
    elif which == 2:
        message.outputs.add(name=random.choice(("nobody", "", "x" * 1000)))
    elif which == 3:
        message.parameters[random.choice(("temperature", "nobody", "stream"))].string_param = random.choice(
            ("hot", "", "\x00", "x" * 100_000)
        )
    elif which == 4:
        inner = message.inputs[0].parameters
        inner["shared_memory_region"].string_param = "nobody"
        inner["shared_memory_byte_size"].int64_param = random.choice((-1, 2**62, 6))
        del message.raw_input_contents[:]
    else:
        return rpc(message, "a unary call", "refusal", "ModelInfer")
    about = f"{message.model_name[:20]!r} {message.model_version[:20]!r} {which}"
    # A parameter may be one of Triton's own, which it takes.
    return rpc(message, about, "refusal")


def _grpc_bytes(random: Random, model: str) -> Attack:
    message = service_pb2.ModelInferRequest(model_name=model, id="x" * random.choice((1, 100_000)))
    add_text(message, "text_input", "Hi")
    add_text(message, "sampling_parameters", '{"max_tokens": 1}')
    data = bytearray(message.SerializeToString())
    how = random.choice(("random", "cut", "flipped", "empty", "twice"))
    if how == "random":
        data = bytearray(random.randbytes(random.choice((1, 20, 5000))))
    elif how == "cut":
        del data[random.randrange(1, len(data)) :]
    elif how == "flipped":
        for _ in range(3):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    else:
        data = bytearray() if how == "empty" else data + data
    method = random.choice(("ModelStreamInfer", "ModelStreamInfer", "ModelInfer"))
    return rpc(bytes(data), f"{how}, {method}", "either", method)


# Triton over HTTP


def _http_shapes(random: Random, model: str) -> Attack:
    texts: tuple[Any, ...] = (5, None, True, [], ["a", "b"], {"a": 1}, [5], [None], 1e400)
    ids: tuple[Any, ...] = ([], [-1], [10**6], [1.5], ["a"], [[1, 2]], "x", {}, [None])
    flags: tuple[Any, ...] = ("maybe", [True, False], {}, [], [None], "x" * 1000)
    body: dict[str, Any] = random.choice(
        (
            *({"text_input": text} for text in texts),
            *({"input_ids": given} for given in ids),
            *({"text_input": "Hi", "stream": flag} for flag in flags),
            *({"text_input": "Hi", "return_logprobs": flag} for flag in flags),
            *({"text_input": "Hi", "sampling_parameters": given} for given in (5, [], {"max_tokens": 1}, [{}])),
            *({"text_input": "Hi", "parameters": given} for given in (5, [], "x", {"a": []}, {"nobody": 1})),
            {"text_input": "Hi", "input_ids": [1]},
            {"nothing": 1},
            {},
        )
    )
    action = random.choice(("generate", "generate_stream", "infer"))
    return posted(f"/v2/models/{model}/{action}", body, f"{action} {told(body)}", "refusal")


def _http_binary(random: Random, model: str) -> Attack:
    """KServe's binary tensors: lengths in a header and in JSON that may say anything."""
    raw = random.choice((_TEXT, b"", b"\xff" * 8, struct.pack("<I", 2**32 - 1), _TEXT * 1000))
    size = random.choice((len(raw), 0, -1, 2**40, len(raw) + 1, "x", None))
    shape = random.choice(([1], [0], [-1], [2**62], [], "x", [1.5]))
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": size}}
    head = posted("", {"inputs": random.choice(([tensor], [tensor, tensor], tensor, [], None, [5]))}, "").body
    length = random.choice((len(head), 0, -1, len(head) + len(raw) + 1, 2**63, "x", 3))
    made = posted(f"/v2/models/{model}/infer", head + raw, f"{size} {shape} {length}", "refusal")
    return replace(made, headers={"Inference-Header-Content-Length": str(length)})


def _triton_paths(random: Random, model: str) -> Attack:
    path = random.choice(
        (
            *(f"/v2/models/{name}/generate" for name in ("nobody", "%00", "..%2f..", "x" * 5000, "%ff%fe", "")),
            *(f"/v2/models/{model}/versions/{version}/generate" for version in ("0", "99", "-1", "x", "9" * 300)),
            *(f"/v2/models/{model}/{action}" for action in ("", "nothing", "generate/more", "generate?x=%", "stats/x")),
            *("/", "/v2/nothing", "/v3", "//", "/v2/models", "/%", "/../../etc/passwd", "/v2/models/a/versions//infer"),
        )
    )
    method = random.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"))
    made = posted(path, {"text_input": "Hi", "sampling_parameters": '{"max_tokens": 1}'}, f"{method} {path[:80]}")
    return replace(made, method=method)


# HTTP at both doors

_PACES: tuple[Pace, ...] = ("slowly", "half")


def _gateway_paths(random: Random, model: str) -> Attack:
    known = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics")
    other = (
        *(
            "/v2",
            "/v1/",
            "/v1/models/nobody",
            "/v1/models/%00",
            "/v1/models/%ff",
            "//",
            "/../../etc/passwd",
            "/%",
            "/.",
        ),
        *(
            "/tokenizer_info?model=nobody",
            "/tokenizer_info?model=%ff",
            "/?x=" + "y" * 5000,
            "/" + "x" * 5000,
            "/\u00e9",
        ),
        *("/v1/embeddings", "/docs", "/openapi.json", "/v1/models/../../x", "/tokenize?a=b", "/a%0d%0ab", "/\x7f", "*"),
    )
    path = random.choice((*known, *other))
    method = random.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"))
    headers = random.choice(
        (
            {"Content-Type": "text/plain"},
            {"Content-Encoding": "gzip"},
            {"Authorization": "Bearer \xff"},
            {"X-Request-Id": "x" * 10_000},
            {"Origin": "http://elsewhere", "Sec-Fetch-Site": "cross-site"},
            {"Accept": "image/png", "Range": "bytes=0-1"},
            {"Upgrade": "websocket", "Connection": "Upgrade, close"},
            {"Host": "[::1"},
            {"Host": "x" * 5000},
        )
    )
    body = posted("", {"model": model, "prompt": "Hi", "max_tokens": 1}, "").body
    return Attack(path=path, about=f"{method} {path[:80]}", body=body, method=method, headers=headers)


def _frame(door: str, random: Random, model: str) -> Attack:
    """Bytes that are no HTTP, or nearly."""
    path, body = _sound(door, random, model)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    length = f"Content-Length: {len(body)}\r\n".encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in (body + b" " * random.choice((0, 20_000))))
    frames: dict[str, bytes] = {
        "negative length": head + b"Content-Length: -5\r\n\r\n" + body,
        "length that is none": head + b"Content-Length: five\r\n\r\n" + body,
        "two lengths": head + length + b"Content-Length: 3\r\n\r\n" + body,
        "endless length": head + b"Content-Length: " + b"9" * random.choice((400, 5000)) + b"\r\n\r\n" + body,
        "length and chunks": head + length + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n",
        "chunks of a byte": head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n",
        "chunk of no size": head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + body,
        "chunk of endless size": head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + body,
        "unknown coding": head + b"Transfer-Encoding: banana\r\n\r\n" + body,
        "long header": head + b"X-Long: " + b"x" * 200_000 + b"\r\n" + length + b"\r\n" + body,
        "many headers": head + b"X: y\r\n" * 5000 + length + b"\r\n" + body,
        "NUL in a header": head + b"X: a\x00b\r\n" + length + b"\r\n" + body,
        "no colon": head + b"nonsense\r\n" + length + b"\r\n" + body,
        "no host": head.replace(b"Host: x\r\n", b"") + length + b"\r\n" + body,
        "HTTP of the future": head.replace(b"1.1", b"9.9") + length + b"\r\n" + body,
        "HTTP 0.9": b"GET /\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(400),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        "random": random.randbytes(3000) + b"\r\n\r\n",
        "newlines": b"\r\n" * 3000,
    }
    # For the rest of what may yet become a request Triton waits without an end.
    waits = ("HTTP 0.9", "newlines", "chunk of endless size") if door == "http" else ()
    name = random.choice([name for name in frames if name not in waits])
    return Attack(path=path, about=name, body=frames[name], frame=True)


def _slow(door: str, random: Random, model: str) -> Attack:
    path, body = _sound(door, random, model)
    pace = random.choice(_PACES)
    return replace(posted(path, body, f"{pace} {path}", "answer"), pace=pace)


def _sound(door: str, random: Random, model: str) -> tuple[str, bytes]:
    """A path and a body that nothing is wrong with."""
    if door == "gateway":
        path, fields = asked(random, model)
        return path, posted(path, fields, "").body
    made = triton(door, model, {"text_input": "Hi"}, '{"max_tokens": 1}', "", stream=random.random() < 0.5)
    return made.path, made.body
