"""What can be asked of a model without an answer: /v1/models, /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from stillhouse.gateway.bodies import DetokenizeBody, TokenizeBody
from stillhouse.gateway.body import read_body
from stillhouse.gateway.errors import invalid
from stillhouse.gateway.gateway import Gateway
from stillhouse.gateway.generator import ServedModel
from stillhouse.gateway.prompts import aside, chat_ids, checked_ids, text_ids


def router(gateway: Gateway) -> APIRouter:
    """The paths over `gateway`."""
    routes = APIRouter()

    @routes.api_route("/v1/models", methods=["GET", "HEAD"])
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [_entry(model) for model in gateway.models()]})

    @routes.api_route("/v1/models/{name:path}", methods=["GET", "HEAD"])
    async def one_model(name: str) -> Response:
        return JSONResponse(_entry(gateway.model(name)))

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request, TokenizeBody)
        model = gateway.model(body.model) if body.model else gateway.only_model()
        ids = await _tokenized(model, body)
        return await aside(partial(_listed, model, ids, with_texts=bool(body.return_token_strs)), len(ids))

    @routes.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request, DetokenizeBody)
        model = gateway.model(body.model) if body.model else gateway.only_model()
        decode = partial(_text_of, model, body.tokens)
        return JSONResponse({"prompt": await asyncio.get_running_loop().run_in_executor(None, decode)})

    @routes.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Response:
        served = gateway.model(model) if model else gateway.only_model()
        tokenizer = served.tokenizer
        return JSONResponse({**tokenizer.special_texts, "chat_template": tokenizer.template_source})

    return routes


def _listed(model: ServedModel, ids: list[int], *, with_texts: bool) -> Response:
    texts = [model.tokenizer.token(token) for token in ids] if with_texts else None
    return JSONResponse({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": texts})


def _text_of(model: ServedModel, tokens: list[int]) -> str:
    return model.tokenizer.decode(checked_ids(model, tokens, "tokens"), skip_special_tokens=False)


async def _tokenized(model: ServedModel, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("exactly one of prompt and messages must be given", "prompt")
    if body.prompt is not None:
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return (await text_ids(model, [body.prompt], add_special_tokens=special))[0]
    return await chat_ids(
        model,
        body.messages or [],
        body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
    )


def _entry(model: ServedModel) -> dict[str, Any]:
    """OpenAI's fields, and vLLM's (`root`, `parent`, `max_model_len`), which its benchmark asks for."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "stillhouse",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
        "version": model.version,
    }
