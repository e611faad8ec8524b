"""Guard: the first that sees a request, and the last that sees its answer.

Design choices:
- With a key, every route but the health check asks for it, and compares it in constant time.
- Without one, the server is on this machine alone, and answers only those that call it by a name of
  this machine: else a page in a browser here could make its own name lead here and read on.
- Whatever fails behind it is an error in OpenAI's shape; a traceback goes to the log only.
"""

from __future__ import annotations

import hmac
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_multi.serving.errors import ApiError, internal_error
from gemma_multi.serving.metrics import Metrics
from gemma_multi.serving.options import ServerOptions
from gemma_multi.serving.worker import log

_HERE = {"localhost", "127.0.0.1", "[::1]"}


class Guard:
    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._open = {options.health_route}
        if options.predict_route is not None and options.api_key is None:
            self._open.add(options.predict_route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._refusal(scope)
            app = self._app if refused is None else refused.response()
            await app(scope, receive, counted)
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if not status:
                await internal_error().response()(scope, receive, counted)
        finally:
            route = scope.get("route")  # a path that leads nowhere is none, or there were many
            path = getattr(route, "path", "")
            self._metrics.answered(path, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, options = Headers(scope=scope), self._options
        if scope["path"] in self._open:
            return None
        if options.api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer" and hmac.compare_digest(
                key.strip().encode(), options.api_key.encode()
            ):
                return None
            return _unknown("no API key, or a wrong one: send Authorization: Bearer KEY")
        if not options.is_local:  # a container of Vertex AI
            return _unknown("this server has no API key, and so nobody may ask here")
        name = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if name.lower() not in _HERE and headers.get("host", "") != "[::1]":
            return ApiError(
                403, f"this server is asked as {name[:200]!r}, expected localhost or 127.0.0.1; "
                "to be reached by other names it needs an API key", code="wrong_host",
            )  # fmt: skip
        return None


def _unknown(message: str) -> ApiError:
    return ApiError(
        401, message, type="authentication_error", code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip
