"""POST /v1/completions"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.generation import GenerationResult
from gemma_multi.serving.answers import (
    completion_logprobs,
    finish_reason,
    generations,
    several_options,
    usage,
    wants_usage,
)
from gemma_multi.serving.app import Chunks, Served, Server, sse
from gemma_multi.serving.requests import CompletionRequest
from gemma_multi.serving.tickets import Ended, Generation, Piece

FIELDS = set(CompletionRequest.model_fields)
_MAX_TOKENS = 16  # OpenAI's default for completions


async def completions(server: Server, body: CompletionRequest, request: Request) -> Response:
    if body.stream:
        return await sse(_chunks(server, body, request), FIELDS, "prompt")
    return JSONResponse(await completion_answer(server, body, request))


async def completion_answer(
    server: Server, body: CompletionRequest, request: Request
) -> dict[str, Any]:
    """A whole answer: the choices of each prompt in a row."""
    served, jobs = _jobs(server, body)
    results = await server.results(request, served, jobs)
    choices = [
        _choice(i, result.text, finish_reason(result),
                None if body.logprobs is None
                else completion_logprobs(served.tokenizer, result.logprobs, 0))
        for i, result in enumerate(results)
    ]  # fmt: skip
    return {**_about(served), "choices": choices, "usage": usage(results, body.n or 1)}


async def _chunks(server: Server, body: CompletionRequest, request: Request) -> Chunks:
    served, jobs = _jobs(server, body)
    about, blank = _about(served), {"usage": None} if wants_usage(body) else {}
    results: dict[int, GenerationResult] = {}
    offsets: Counter[int] = Counter()  # characters that logprobs were told of
    async with server.asked(request, served, jobs) as ticket:
        async for index, event in ticket.events():
            logprobs = None
            if event.logprobs:
                logprobs = completion_logprobs(served.tokenizer, event.logprobs, offsets[index])
                offsets[index] += sum(map(len, logprobs["tokens"]))
            if isinstance(event, Piece):
                choice = _choice(index, event.text, None, logprobs)
            else:
                assert isinstance(event, Ended)
                results[index] = event.outcome
                choice = _choice(index, "", finish_reason(event.outcome), logprobs)
            yield {**about, "choices": [choice], **blank}
    if wants_usage(body):
        ordered = [results[i] for i in sorted(results)]
        yield {**about, "choices": [], "usage": usage(ordered, body.n or 1)}


def _jobs(server: Server, body: CompletionRequest) -> tuple[Served, list[Generation]]:
    served = server.find(body.model)
    most = server.most_tokens(served, "max_tokens", body.max_tokens, _MAX_TOKENS)
    options = {**several_options(body), "max_tokens": most, "raw": True, "logprobs": body.logprobs}
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return served, [job for one in prompts for job in generations(one, options, body.n)]


def _about(served: Served) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
        "created": int(time.time()), "model": served.name,
    }  # fmt: skip


def _choice(index: int, text: str, reason: str | None, logprobs: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
