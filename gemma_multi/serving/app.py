"""The ASGI application: models behind routes.

A request's way: `guard` lets it in, `endpoint` reads its body and checks it against its model in
`requests`, a module an endpoint turns it into jobs, `asked` puts those in the queue of the `worker`
that has the model, and what comes of them goes out whole or, by `sse`, piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gemma_multi.sampling import GenerationOptions
from gemma_multi.serving.errors import ApiError, invalid, of_exception, of_validation, overloaded
from gemma_multi.serving.metrics import Metrics
from gemma_multi.serving.options import ServerOptions
from gemma_multi.serving.tickets import AnswerJob, Ticket
from gemma_multi.serving.worker import Cancelled, Full, Worker, log
from gemma_multi.tokenizer import Tokenizer

B = TypeVar("B", bound=BaseModel)
Chunks = AsyncGenerator[Mapping[str, Any] | tuple[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Served:
    """What a client may write for `model`."""

    name: str
    worker: Worker
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.worker.model.tokenizer


@dataclass(frozen=True)
class Server:
    """Models by name, and what is counted of them."""

    models: Mapping[str, Served]
    options: ServerOptions
    metrics: Metrics = field(default_factory=Metrics)

    def find(self, name: str) -> Served:
        """Raises ApiError for a model that is not here."""
        if name not in self.models:
            raise ApiError(
                404, f"no model is called {name[:200]!r}; there are: {', '.join(self.models)}",
                param="model", code="model_not_found",
            )  # fmt: skip
        return self.models[name]

    def most_tokens(
        self, served: Served, param: str, asked: int | None, usual: int | None = None
    ) -> int:  # fmt: skip
        """How many tokens an answer may have: as asked for, or as is `usual`, which is what
        `Model.generate` gives. Raises ApiError for more than one answer may ask for."""
        most = self.options.max_tokens
        if asked is None:
            own = GenerationOptions.merge(served.worker.model.base.generation, {})
            return min(usual or own.max_tokens, most)
        if asked > most:
            raise invalid(
                f"{param} is {asked}, but this server gives at most {most} tokens an answer", param
            )
        return asked

    @contextlib.asynccontextmanager
    async def asked(
        self, request: Request, served: Served, jobs: Sequence[AnswerJob]
    ) -> AsyncIterator[Ticket]:
        """Puts jobs in the queue. They end when the client leaves, and when their time is up."""
        ticket = Ticket(jobs, served.adapter, self.metrics.of(served.name))
        try:
            served.worker.submit(ticket)
        except Full:
            raise overloaded(self._retry_after(served)) from None
        watch = asyncio.create_task(_until_gone(request, ticket))
        timer = asyncio.get_running_loop().call_later(self.options.seconds, ticket.cancel)
        try:
            yield ticket
        except Cancelled:
            raise overloaded(self._retry_after(served)) from None
        finally:
            timer.cancel()
            watch.cancel()
            ticket.cancel()

    async def results(
        self, request: Request, served: Served, jobs: Sequence[AnswerJob]
    ) -> list[Any]:
        """What comes of jobs, when all are done."""
        async with self.asked(request, served, jobs) as ticket:
            return await ticket.outcomes()

    def _retry_after(self, served: Served) -> int:
        """Seconds: one for every full round of those that wait."""
        return 1 + served.worker.waiting // served.worker.seats


async def _until_gone(request: Request, ticket: Ticket) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


def endpoint(
    server: Server, kind: type[B], prompt: str,
    answer: Callable[[Server, B, Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:  # fmt: skip
    """A route's handler. `prompt` is the field that holds the text, which errors are about that
    name no other."""
    fields = set(kind.model_fields)

    async def handle(request: Request) -> Response:
        try:
            body = await read_body(request, server.options)
            return await answer(server, checked(kind, body), request)
        except Exception as error:
            told = of_exception(error, fields, prompt)
            _log(error, told)
            return told.response()

    return handle


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """Raises ApiError for one that is too large, comes too slowly, or is not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the body is {kind or 'of no type'}, expected the header Content-Type: "
            "application/json", code="unsupported_media_type",
        )  # fmt: skip
    body = bytearray()
    try:
        async with asyncio.timeout(options.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > options.max_body:
                    raise ApiError(
                        413, f"the body is longer than {options.max_body} bytes", code="too_large"
                    )
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {options.body_seconds:g} s", code="timeout",
            headers={"Connection": "close"},
        ) from None  # fmt: skip
    return bytes(body)


def checked(kind: type[B], body: bytes) -> B:
    """Raises ApiError naming what is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        raise of_validation(error, given) from None


def _log(error: Exception, told: ApiError) -> None:
    if told.status >= 500 and error is not told:
        log.error("a request failed", exc_info=error)


async def sse(
    chunks: Chunks, fields: set[str], prompt: str, last: str | None = "[DONE]"
) -> StreamingResponse:  # fmt: skip
    """Server-sent events. What goes wrong before the first has a status of its own and is raised,
    what goes wrong later is an event."""
    first = await anext(chunks)

    async def lines() -> AsyncIterator[bytes]:
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
            if last is not None:
                yield f"data: {last}\n\n".encode()
        except Exception as error:
            told = of_exception(error, fields, prompt)
            _log(error, told)
            yield _event({"error": told.error})
        finally:
            await chunks.aclose()

    return StreamingResponse(lines(), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache"})  # fmt: skip


def _event(chunk: Any) -> bytes:
    """One event, with a name if it has one."""
    name, data = chunk if isinstance(chunk, tuple) else ("", chunk)
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode(errors="replace")
