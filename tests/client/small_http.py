"""The small server over HTTP: KServe v2 with generate and generate_stream, its metrics and its log."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web
from small_model import MODELS, Broken, CutShort, Garbage, ModelError, Server

QUEUE_S = 0.004  # what each request is said to have waited


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
        except Garbage:
            await response.write(b"data: <html>bad gateway</html>\n\n")
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
            asked = sum(entry["model"] == name for entry in server.log)
            queue = "stillhouse_request_queue_time_seconds"
            for bound, count in (("0.01", asked), ("0.1", asked), ("+Inf", asked)):
                lines.append(f'{queue}_bucket{{{labels},le="{bound}"}} {count}')
            lines += [f"{queue}_sum{{{labels}}} {asked * QUEUE_S}", f"{queue}_count{{{labels}}} {asked}"]
        return web.Response(text="\n".join(lines) + "\n")

    async def metadata(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.json_response({"name": "small", "version": "0", "extensions": ["model_repository"]})

    async def model_metadata(request: web.Request) -> web.Response:
        inputs = [{"name": name, "datatype": "BYTES", "shape": [1]} for name in server.input_names()]
        return web.json_response({"name": request.match_info["model"], "inputs": inputs})

    async def stall(request: web.Request) -> web.Response:
        """POST /stall?s=3: for so long no token leaves."""
        loop = asyncio.get_running_loop()
        server.stalled_until_s = loop.time() + float(request.query["s"])
        return web.json_response({"begun_s": loop.time(), "until_s": server.stalled_until_s})

    async def log(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.json_response(server.log)

    app = web.Application()
    app.router.add_post("/v2/models/{model}/generate", generate)
    app.router.add_post("/v2/models/{model}/versions/{version}/generate", generate)
    app.router.add_post("/v2/models/{model}/generate_stream", generate_stream)
    app.router.add_post("/v2/models/{model}/versions/{version}/generate_stream", generate_stream)
    app.router.add_post("/v2/repository/index", index)
    app.router.add_get("/v2", metadata)
    app.router.add_get("/v2/models/{model}", model_metadata)
    app.router.add_post("/stall", stall)
    app.router.add_get("/v2/health/ready", ready)
    app.router.add_get("/v2/models/{model}/ready", ready)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/log", log)
    return app
