"""A small server with known behaviour: KServe v2 over gRPC and HTTP, and the OpenAI API, each at a port of its own.

Run as a process of its own; prints one JSON line with its ports once it listens. What a request does is said by
its prompt: a JSON object with the keys of `Plan`; any other prompt gets the default plan of the command line.
`GET /log` answers what it saw, so that a test can ask whether a request was cancelled there, and when its first and
last token really left (a busy machine adds to the plan).
"""

from __future__ import annotations

import argparse
import asyncio
import json

import grpc
from aiohttp import web
from small_grpc import Grpc
from small_http import http_routes
from small_model import Plan, Server
from small_openai import openai_routes
from tritonclient.grpc import service_pb2_grpc


async def serve(server: Server, api_key: str) -> None:
    grpc_server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Grpc(server), grpc_server)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    http_port = await listen(http_routes(server))
    openai_port = await listen(openai_routes(server, api_key))
    ports = {"grpc_port": grpc_port, "http_port": http_port, "openai_port": openai_port}
    print(json.dumps(ports), flush=True)
    await grpc_server.wait_for_termination()


async def listen(app: web.Application) -> int:
    """The port that it got."""
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return int(runner.addresses[0][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=Plan.tokens)
    parser.add_argument("--first-s", type=float, default=Plan.first_s)
    parser.add_argument("--gap-s", type=float, default=Plan.gap_s)
    parser.add_argument("--api-key", default="", help="of the OpenAI API; everybody is served without")
    parser.add_argument("--slots", type=int, default=10_000, help="answers at a time; others wait for their turn")
    parser.add_argument("--no-messages", action="store_true", help="over Triton a text alone, as vLLM's own backend")
    parser.add_argument("--no-counts", action="store_true", help="over Triton no counts and no finish reason either")
    options = parser.parse_args()
    plan = Plan(tokens=options.tokens, first_s=options.first_s, gap_s=options.gap_s)
    model = Server(plan, options.slots, takes_messages=not options.no_messages, counts=not options.no_counts)
    asyncio.run(serve(model, options.api_key))


if __name__ == "__main__":
    main()
