"""The small server over the OpenAI API: chat completions and completions, streamed or whole, with usage."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web
from small_model import MODELS, Broken, CutShort, Garbage, ModelError, Server


def openai_routes(server: Server, api_key: str) -> web.Application:
    """The routes; with a key only for those who send it."""

    @web.middleware
    async def guard(request: web.Request, handler: Any) -> web.StreamResponse:
        if api_key and request.headers.get("Authorization") != f"Bearer {api_key}":
            return refused("Incorrect API key provided", 401)
        return await handler(request)  # type: ignore[no-any-return]

    async def models(request: web.Request) -> web.Response:  # noqa: ARG001
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]})

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        chat = request.path.endswith("chat/completions")
        try:
            server.check(body["model"], "")
        except ModelError as error:
            return refused(str(error), 404)
        inputs = read_inputs(body)
        if not body.get("stream"):
            return await whole(body, inputs, chat)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        sent, thoughts = 0, server.plan(inputs).think
        # What names an event: some clients go by `object`.
        name = {"id": "1", "object": "chat.completion.chunk" if chat else "text_completion", "model": body["model"]}

        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            await response.write(b"data: " + json.dumps({**name, "choices": choices, **more}).encode() + b"\n\n")

        try:
            async for outputs in server.answer(body["model"], inputs):
                if not sent:
                    await response.prepare(request)
                    if chat:
                        await send([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
                sent += 1
                await send([choice_of(outputs, chat, thought=sent <= thoughts)])
            if with_usage:
                await send([], usage={"prompt_tokens": 7, "completion_tokens": sent, "total_tokens": 7 + sent})
            await response.write(b"data: [DONE]\n\n")
        except ModelError as error:
            if not sent:
                return refused(str(error), 400)
            await response.write(b"data: " + json.dumps({"error": {"message": str(error)}}).encode() + b"\n\n")
        except CutShort:
            pass
        except Garbage:
            await response.write(b"data: <html>bad gateway</html>\n\n")
        except Broken:
            if request.transport:
                request.transport.abort()
        return response

    async def whole(body: dict[str, Any], inputs: dict[str, Any], chat: bool) -> web.Response:
        async for outputs in server.answer(body["model"], {**inputs, "stream": False}):
            text = outputs["text_output"]
            choice = {
                "index": 0,
                "finish_reason": "stop",
                **({"message": {"content": text}} if chat else {"text": text}),
            }
            usage = {"prompt_tokens": 7, "completion_tokens": outputs["num_output_tokens"]}
            return web.json_response({"choices": [choice], "usage": usage})
        return refused("no answer", 500)

    async def metrics(request: web.Request) -> web.Response:  # noqa: ARG001
        """As an edge server's: of the one process, without a model's name."""
        return web.Response(text="stillhouse_edge_process_resident_memory_bytes 3.5e+09\n")

    app = web.Application(middlewares=[guard])
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_post("/v1/completions", complete)
    return app


def read_inputs(body: dict[str, Any]) -> dict[str, Any]:
    """A body as the model knows it."""
    others = {name: value for name, value in body.items() if name not in ("model", "messages", "prompt", "stream")}
    inputs: dict[str, Any] = {"stream": True, "sampling_parameters": json.dumps(others)}
    if "messages" in body:
        return {**inputs, "messages": json.dumps(body["messages"])}
    return {**inputs, "text_input": body["prompt"]}


def choice_of(outputs: dict[str, Any], chat: bool, *, thought: bool) -> dict[str, Any]:
    text, reason = outputs["text_output"], outputs["finish_reason"]
    finish = {"index": 0, "finish_reason": None if reason == "None" else reason}
    if not chat:
        return {**finish, "text": text}
    return {**finish, "delta": {"reasoning_content" if thought else "content": text}}


def refused(message: str, status: int) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=status)
