"""Which path leads where."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gemma_multi.serving.app import Served, Server, endpoint
from gemma_multi.serving.chat import chat_completions
from gemma_multi.serving.completions import completions
from gemma_multi.serving.embeddings import embeddings
from gemma_multi.serving.errors import ApiError
from gemma_multi.serving.guard import Guard
from gemma_multi.serving.metrics import CONTENT_TYPE
from gemma_multi.serving.openapi import openapi
from gemma_multi.serving.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    ResponseRequest,
)
from gemma_multi.serving.responses import responses
from gemma_multi.serving.vertex import PredictRequest, predict

ENDPOINTS: tuple[tuple[str, type[BaseModel], str, Any], ...] = (
    # path, its request, the field of the text, what answers
    ("/v1/chat/completions", ChatRequest, "messages", chat_completions),
    ("/v1/completions", CompletionRequest, "prompt", completions),
    ("/v1/responses", ResponseRequest, "input", responses),
    ("/v1/embeddings", EmbeddingRequest, "input", embeddings),
)
_WHOLE = {"/v1/embeddings"}  # all others may be streamed


def create_app(server: Server) -> Starlette:
    """The ASGI application. When it ends, it finishes what the workers have begun."""

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_about(m) for m in server.models.values()]})

    async def model(request: Request) -> Response:
        return JSONResponse(_about(server.find(request.path_params["name"])))

    async def health(_: Request) -> Response:
        if all(one.worker.alive for one in server.models.values()):
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "a worker has ended"}, 503)

    async def metrics(_: Request) -> Response:
        return Response(server.metrics.page(), media_type=CONTENT_TYPE)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        for worker in {one.worker for one in server.models.values()}:
            await asyncio.to_thread(worker.close)

    async def document(_: Request) -> Response:
        return JSONResponse(described)

    posts = list(ENDPOINTS)
    whole = set(_WHOLE)
    if server.options.predict_route is not None:
        posts.append((server.options.predict_route, PredictRequest, "instances", predict))
        whole.add(server.options.predict_route)
    gets = {
        "/v1/models": models, "/metrics": metrics, server.options.health_route: health,
        "/openapi.json": document,
    }  # fmt: skip
    described = openapi(
        [(path, kind) for path, kind, *_ in posts], list(gets),
        {path for path, *_ in posts} - whole, list(server.models),
    )  # fmt: skip
    routes = [
        Route(path, endpoint(server, kind, prompt, answer), methods=["POST"])
        for path, kind, prompt, answer in posts
    ]
    routes += [Route(path, answer) for path, answer in gets.items()]
    routes.append(Route("/v1/models/{name:path}", model))  # ids of the hub have a slash
    server.metrics.watch(server.models.values())
    return Starlette(
        routes=routes, lifespan=lifespan,
        middleware=[Middleware(Guard, options=server.options, metrics=server.metrics)],
        exception_handlers={HTTPException: _refused, ApiError: _told},
    )  # fmt: skip


def _about(served: Served) -> dict[str, object]:
    return {
        "id": served.name, "object": "model", "created": served.created, "owned_by": "gemma-multi"
    }  # fmt: skip


async def _told(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _refused(request: Request, error: Exception) -> Response:
    """What Starlette says of a path or a method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path[:200]
    what = {404: f"there is nothing at {path}", 405: f"{path} takes no {method}"}
    message = what.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()
