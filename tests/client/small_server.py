"""A small KServe v2 server with known behaviour: gRPC streaming, HTTP generate and generate_stream, metrics.

Run as a process of its own; prints one JSON line with its ports once it listens. What a request does is said by
its prompt: a JSON object with the keys of `Plan`; any other prompt gets the default plan of the command line.
`GET /log` answers what it saw, so that a test can ask whether a request was cancelled there, and when its first and
last token really left (a busy machine adds to the plan).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields, replace
from typing import Any

import grpc
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc

MODELS = {"support-fp16": ["1"], "support-int4": ["1", "2"]}
TOKEN_BYTES = 6


@dataclass(frozen=True)
class Plan:
    """What one request gets: `tokens` words, the first after `first_s`, the others `gap_s` apart."""

    tokens: int = 5
    first_s: float = 0.02
    gap_s: float = 0.01
    stall_after: int = -1  # after so many tokens: neither error nor end
    break_after: int = -1  # after so many tokens: the connection is gone
    end_after: int = -1  # after so many tokens: a clean end, but no finish reason
    error_after: int = -1  # after so many tokens: the model's error
    error: str = "the model said no"
    echo: bool = False  # the first word is the JSON of the inputs that came


class ModelError(Exception):
    """An error that the model answers with."""


class CutShort(Exception):
    """The answer ends here, in good form, but without its last response."""


class Broken(Exception):
    """The connection must be cut."""


class Server:
    def __init__(self, default: Plan) -> None:
        self.default = default
        self.log: list[dict[str, Any]] = []

    def plan(self, inputs: dict[str, Any]) -> Plan:
        prompt = inputs.get("text_input", "")
        if "messages" in inputs:
            prompt = json.loads(inputs["messages"])[-1]["content"]
        limit = json.loads(inputs.get("sampling_parameters") or "{}").get("max_tokens")
        try:
            wish = json.loads(prompt)
        except json.JSONDecodeError:
            wish = None
        if not isinstance(wish, dict):
            # A plain prompt obeys max_tokens, as a real model does.
            return replace(self.default, tokens=min(self.default.tokens, limit or self.default.tokens))
        return replace(self.default, **{f.name: wish[f.name] for f in fields(Plan) if f.name in wish})

    def check(self, model: str, version: str) -> None:
        if model not in MODELS:
            raise ModelError(f"Request for unknown model: '{model}' is not found")
        if version and version not in MODELS[model]:
            raise ModelError(f"Request for unknown model: '{model}' version {version} is not found")

    async def answer(self, model: str, inputs: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The outputs of one response after another, as the vLLM backend names them."""
        plan = self.plan(inputs)
        entry: dict[str, Any] = {"model": model, "inputs": inputs, "sent": 0, "ended": "cancelled"}
        self.log.append(entry)
        loop = asyncio.get_running_loop()
        came = loop.time()
        due = came + plan.first_s
        text = ""
        for index in range(plan.tokens + 1):
            if index == plan.stall_after:
                await asyncio.sleep(3600)
            if index == plan.break_after:
                raise Broken
            if index == plan.error_after:
                entry["ended"] = "error"
                raise ModelError(plan.error)
            if index == plan.end_after:
                entry["ended"] = "cut short"
                raise CutShort
            if index == plan.tokens:
                break
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += plan.gap_s
            last = index == plan.tokens - 1
            word = json.dumps(inputs) if plan.echo and index == 0 else f"word{index % 10} "
            text += word
            entry["sent"] += 1
            entry["last_s"] = loop.time() - came
            entry.setdefault("first_s", entry["last_s"])
            if inputs.get("stream"):
                yield self.outputs(word, index, 1, last)
        if not inputs.get("stream"):
            yield self.outputs(text, plan.tokens - 1, plan.tokens, True)
        entry["ended"] = "done"

    def outputs(self, text: str, index: int, new_tokens: int, last: bool) -> dict[str, Any]:
        return {
            "text_output": text,
            "finish_reason": "stop" if last else "None",
            "cumulative_logprob": -0.5 * (index + 1),
            "num_input_tokens": 7,
            "num_output_tokens": new_tokens,
        }


# --- gRPC ---


def read_inputs(request: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            inputs[tensor.name] = raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode()
        elif tensor.datatype == "BOOL":
            inputs[tensor.name] = bool(raw[0])
        else:
            inputs[tensor.name] = list(struct.unpack(f"<{len(raw) // 4}i", raw))
    return inputs


_FORMATS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}


def write_outputs(model: str, outputs: dict[str, Any]) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.model_name = model
    for name, value in outputs.items():
        kind = _FORMATS[name]
        response.infer_response.outputs.add(name=name, datatype=kind, shape=[1])
        if kind == "BYTES":
            data = value.encode()
            response.infer_response.raw_output_contents.append(struct.pack("<I", len(data)) + data)
        else:
            response.infer_response.raw_output_contents.append(struct.pack("<f" if kind == "FP32" else "<I", value))
    return response


class Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, server: Server) -> None:
        self.server = server

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return service_pb2.ModelReadyResponse(ready=request.name in MODELS)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        response = service_pb2.RepositoryIndexResponse()
        for name, versions in MODELS.items():
            for version in versions:
                response.models.add(name=name, version=version, state="READY")
        return response

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        if any(key == "triton_grpc_error" for key, _ in context.invocation_metadata()):
            await context.abort(grpc.StatusCode.INTERNAL, "a real Triton 2.51 dies of this metadata")
        async for request in requests:
            try:
                self.server.check(request.model_name, request.model_version)
                async for outputs in self.server.answer(request.model_name, read_inputs(request)):
                    yield write_outputs(request.model_name, outputs)
            except ModelError as error:
                yield service_pb2.ModelStreamInferResponse(error_message=str(error))
                continue
            except CutShort:
                return
            except Broken:
                # What a client sees when the server's process dies.
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            final = service_pb2.ModelStreamInferResponse()
            final.infer_response.model_name = request.model_name
            final.infer_response.parameters["triton_final_response"].bool_param = self.server.log[-1]["ended"] != (
                "cut short"
            )
            yield final


# --- HTTP ---


def http_routes(server: Server) -> web.Application:
    async def read(request: web.Request) -> tuple[str, dict[str, Any]]:
        model = request.match_info["model"]
        server.check(model, request.match_info.get("version", ""))
        return model, await request.json()

    async def generate(request: web.Request) -> web.Response:
        try:
            model, inputs = await read(request)
            async for outputs in server.answer(model, inputs):
                return web.json_response({"model_name": model, **outputs})
        except ModelError as error:
            return web.json_response({"error": str(error)}, status=400)
        except Broken:
            if request.transport:
                request.transport.abort()
        return web.json_response({"error": "no response"}, status=500)

    async def generate_stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        begun = False
        try:
            model, inputs = await read(request)
            async for outputs in server.answer(model, inputs):
                if not begun:
                    await response.prepare(request)
                    begun = True
                data = json.dumps({"model_name": model, **outputs}, ensure_ascii=False)
                await response.write(f"data: {data}\n\n".encode())
        except ModelError as error:
            if not begun:
                return web.json_response({"error": str(error)}, status=400)
            await response.write(f"data: {json.dumps({'error': str(error)})}\n\n".encode())
        except CutShort:
            pass
        except Broken:
            if request.transport:
                request.transport.abort()
        return response

    async def index(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.json_response(
            [{"name": name, "version": v, "state": "READY"} for name, versions in MODELS.items() for v in versions]
        )

    async def ready(request: web.Request) -> web.Response:
        model = request.match_info.get("model", next(iter(MODELS)))
        return web.Response(status=200 if model in MODELS else 400)

    async def metrics(request: web.Request) -> web.Response:  # noqa: ARG001
        lines = ["# TYPE stillhouse_process_resident_memory_bytes gauge"]
        for number, name in enumerate(MODELS, start=1):
            labels = f'model_name="{name}",model_version="1"'
            lines.append(f"stillhouse_process_resident_memory_bytes{{{labels}}} {number}.5e+09")
        return web.Response(text="\n".join(lines) + "\n")

    async def log(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.json_response(server.log)

    app = web.Application()
    app.router.add_post("/v2/models/{model}/generate", generate)
    app.router.add_post("/v2/models/{model}/versions/{version}/generate", generate)
    app.router.add_post("/v2/models/{model}/generate_stream", generate_stream)
    app.router.add_post("/v2/models/{model}/versions/{version}/generate_stream", generate_stream)
    app.router.add_post("/v2/repository/index", index)
    app.router.add_get("/v2/health/ready", ready)
    app.router.add_get("/v2/models/{model}/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/log", log)
    return app


async def serve(default: Plan) -> None:
    server = Server(default)
    grpc_server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Grpc(server), grpc_server)
    grpc_port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    runner = web.AppRunner(http_routes(server), handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    http_port = runner.addresses[0][1]
    print(json.dumps({"grpc_port": grpc_port, "http_port": http_port}), flush=True)
    await grpc_server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=Plan.tokens)
    parser.add_argument("--first-s", type=float, default=Plan.first_s)
    parser.add_argument("--gap-s", type=float, default=Plan.gap_s)
    options = parser.parse_args()
    asyncio.run(serve(Plan(tokens=options.tokens, first_s=options.first_s, gap_s=options.gap_s)))


if __name__ == "__main__":
    main()
