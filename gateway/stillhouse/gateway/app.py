"""The HTTP application: OpenAI's paths, vLLM's beside them, health, metrics and the page."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from stillhouse.engine.errors import StillhouseError
from stillhouse.gateway import models
from stillhouse.gateway.answers import unless_gone
from stillhouse.gateway.bodies import ChatBody, CompletionBody
from stillhouse.gateway.body import read_body
from stillhouse.gateway.chat import chat_completion, chat_events, chat_job
from stillhouse.gateway.completions import completion, completion_events, completion_job
from stillhouse.gateway.doorway import COUNTED_PATHS, Doorway, error_response
from stillhouse.gateway.errors import ApiError, api_error, unavailable
from stillhouse.gateway.gateway import Gateway
from stillhouse.gateway.metrics import Meter
from stillhouse.gateway.sse import stream_response

_PAGE = Path(__file__).with_name("page") / "index.html"
# The page asks nobody but this server, and no other site may show it in a frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(gateway: Gateway) -> FastAPI:
    """The application over `gateway`; every failure it answers has OpenAI's shape."""
    # FastAPI's own pages load scripts from elsewhere, its redirects lead to the request's Host: there are none.
    app = FastAPI(title="stillhouse", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Doorway, gateway=gateway)
    if gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(gateway.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's package for browsers sends a dozen of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    for kind in (ApiError, StillhouseError):  # what else is thrown, the doorway answers
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.include_router(models.router(gateway))
    _add_answering(app, gateway)
    _add_watching(app, gateway)
    return app


def _add_answering(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        job = await chat_job(gateway.ready_generator(), gateway.model(body.model), Meter(gateway.metrics), body)
        if body.stream:
            return await stream_response(request.receive, chat_events(job, body))
        return await _whole(request, chat_completion(job, body))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        job = await completion_job(gateway.ready_generator(), gateway.model(body.model), Meter(gateway.metrics), body)
        if body.stream:
            return await stream_response(request.receive, completion_events(job, body))
        return await _whole(request, completion(job, body))


def _add_watching(app: FastAPI, gateway: Gateway) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    @app.api_route("/ping", methods=["GET", "HEAD", "POST"])  # SageMaker's name for it, and vLLM's
    async def health() -> Response:
        if (reason := gateway.fault()) is not None:
            return error_response(unavailable(reason))
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.api_route("/version", methods=["GET", "HEAD"])
    async def version() -> Response:
        return JSONResponse({"version": importlib.metadata.version("stillhouse")})

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    async def metrics() -> Response:
        return Response(gateway.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = _PAGE.read_bytes()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return Response(page, headers=_PAGE_HEADERS, media_type="text/html; charset=utf-8")


async def _whole(request: Request, work: Awaitable[dict[str, Any]]) -> Response:
    """The answer as one JSON object; a client that goes away before cancels it."""
    answer = await unless_gone(request.receive, work)
    if answer is None:
        return Response(status_code=499)
    return Response(await written(answer), media_type="application/json")


async def written(answer: dict[str, Any]) -> str:
    """The JSON of an answer, choice by choice: with log-probabilities each may be a megabyte, and others are served."""
    choices = []
    for choice in answer["choices"]:
        choices.append(json.dumps(choice, ensure_ascii=False))
        await asyncio.sleep(0)
    whole = json.dumps({**answer, "choices": []}, ensure_ascii=False)
    return whole.replace('"choices": []', f'"choices": [{", ".join(choices)}]', 1)


async def _answer_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return error_response(api_error(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or no such method there."""
    assert isinstance(error, HTTPException)
    # Not request.url, which fails on a broken Host; and what the path holds may be no line.
    path = f"{request.method} {ascii(request.scope['path'][:200])[1:-1]}"
    if error.status_code == 404:
        here = ", ".join(known for known in COUNTED_PATHS if known.startswith("/v1/"))
        return error_response(ApiError(404, f"Unknown request URL: {path}. Here are {here}", code="unknown_url"))
    headers = dict(error.headers or {})
    return error_response(ApiError(error.status_code, f"{error.detail}: {path}", headers=headers))
