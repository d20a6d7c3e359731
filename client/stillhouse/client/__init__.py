"""A typed client of Triton language models: `Client` and `AsyncClient`, over gRPC or HTTP by the URL.

    from stillhouse.client import Client

    with Client("grpc://localhost:8001") as client:
        for token in client.stream("support-int4", "May I return the boots?", max_tokens=64):
            print(token.text, end="", flush=True)

It speaks the tensors of Triton's vLLM backend, and `messages` and `input_ids` beside them where the server has
these. grpc is loaded when a gRPC URL is first used, urllib3 or aiohttp with an HTTP one.
"""

from __future__ import annotations

from stillhouse.client.aio import AsyncClient
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
)
from stillhouse.client.sync import Client
from stillhouse.client.types import Completion, Message, ModelEntry, Token

__all__ = [
    "AsyncClient",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailed",
    "InvalidCall",
    "Message",
    "ModelEntry",
    "ModelNotFound",
    "Overloaded",
    "RequestRejected",
    "StreamBroken",
    "TimedOut",
    "Token",
    "Unavailable",
]
