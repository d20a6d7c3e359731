"""What every HTTP request passes first: the key, the state of the server, its number, and the counting."""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stillhouse.gateway.errors import ApiError, api_error, unavailable
from stillhouse.gateway.gateway import Gateway

log = logging.getLogger(__name__)

# Whoever watches over the server has no key, and the page asks for one itself.
OPEN_PATHS = ("/", "/health", "/ping")
COUNTED_PATHS = (
    "/",
    "/health",
    "/ping",
    "/version",
    "/metrics",
    "/v1/models",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
)


class Doorway:
    """ASGI middleware; plain, so that a closed connection reaches whoever waits for it."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        gateway, begun_s, status = self._gateway, time.perf_counter(), 499
        headers = Headers(scope=scope)
        request_id = _sound_id(headers.get("x-request-id")) or uuid.uuid4().hex

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(raw=message.setdefault("headers", []))
                added["X-Request-Id"] = request_id
                if gateway.draining:
                    added["Connection"] = "close"
            await send(message)

        path = scope["path"]
        refusal = self._refusal(path, headers)
        gateway.in_flight += 1
        gateway.metrics.in_flight.inc()
        try:
            if refusal is not None:
                await error_response(refusal)(scope, receive, send_and_note)
            else:
                await self._app(scope, receive, send_and_note)
        except Exception as error:  # the boundary: whatever a handler throws is an answer too, and is counted
            log.exception("%s %s failed", scope["method"], path)
            if status != 499:
                raise  # the answer has begun: only its end can say that it failed
            await error_response(api_error(error))(scope, receive, send_and_note)
        finally:
            gateway.in_flight -= 1
            gateway.metrics.in_flight.dec()
            counted = path if path in COUNTED_PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
            gateway.metrics.requests.labels(counted, str(status)).inc()
            took_s = time.perf_counter() - begun_s
            gateway.metrics.request_duration.labels(counted).observe(took_s)
            log.debug("%s %s %s %.0f ms %s", scope["method"], path, status, took_s * 1000, request_id)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if path in OPEN_PATHS:
            return None
        if self._is_from_elsewhere(headers):
            return ApiError(403, "pages of other origins may not ask here: see --cors-origin", code="cross_origin")
        authorization = headers.get("authorization")
        if not self._gateway.admits(authorization):
            said = "Incorrect API key provided" if authorization else "You didn't provide an API key"
            return ApiError(
                401,
                f"{said}: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        reason = None if path == "/metrics" else self._gateway.closed()
        return unavailable(reason) if reason else None

    def _is_from_elsewhere(self, headers: Headers) -> bool:
        """Whether another site's page sent this: a browser lets it ask, and only keeps the answer from it."""
        allowed, origin = self._gateway.cors_origins, headers.get("origin")
        # What the browser says of it, it does not say to http:// addresses other than localhost.
        site = headers.get("sec-fetch-site")
        if "*" in allowed or site == "same-origin" or origin in allowed:
            return False
        return site in ("cross-site", "same-site") or (origin is not None and not _is_own(origin, headers))


def _is_own(origin: str, headers: Headers) -> bool:
    """Whether `origin` is where this request went, as the browser had it or as a proxy hands that on."""
    scheme, _, place = origin.lower().partition("://")
    # No page of another origin can set either header.
    asked = [headers.get("host", ""), *headers.get("x-forwarded-host", "").split(",")]
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    return place != "" and any(own.strip().lower() in (place, place + default) for own in asked)


def error_response(error: ApiError) -> Response:
    """The error as a response."""
    return Response(error.body(), error.status, error.headers, media_type="application/json")


def _sound_id(given: str | None) -> str | None:
    return given if given and len(given) <= 128 and given.isascii() and given.isprintable() else None
