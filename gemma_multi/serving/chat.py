"""POST /v1/chat/completions"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.generation import GenerationResult
from gemma_multi.serving.answers import (
    chat_logprobs,
    finish_reason,
    generations,
    several_options,
    usage,
    wants_usage,
)
from gemma_multi.serving.app import Chunks, Served, Server, sse
from gemma_multi.serving.errors import invalid
from gemma_multi.serving.messages import read_messages
from gemma_multi.serving.requests import ChatRequest, JsonObjectFormat, JsonSchemaFormat
from gemma_multi.serving.tickets import Ended, Generation, Piece

FIELDS = set(ChatRequest.model_fields)


async def chat_completions(server: Server, body: ChatRequest, request: Request) -> Response:
    if body.stream:
        return await sse(_chunks(server, body, request), FIELDS, "messages")
    return JSONResponse(await chat_answer(server, body, request))


async def chat_answer(server: Server, body: ChatRequest, request: Request) -> dict[str, Any]:
    """A whole answer."""
    served, jobs = _jobs(server, body)
    results = await server.results(request, served, jobs)
    choices = [
        {"index": i, "message": _message(result), "logprobs": _logprobs(served, body, result),
         "finish_reason": finish_reason(result)}
        for i, result in enumerate(results)
    ]  # fmt: skip
    about = _about(served, "chat.completion")
    return {**about, "choices": choices, "usage": usage(results, len(results))}


async def _chunks(server: Server, body: ChatRequest, request: Request) -> Chunks:
    """The deltas of each choice, then usage if it is wanted."""
    served, jobs = _jobs(server, body)
    about = _about(served, "chat.completion.chunk")
    blank = {"usage": None} if wants_usage(body) else {}
    begun: set[int] = set()

    def chunk(
        index: int, delta: Mapping[str, Any], told: Any = (), reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = chat_logprobs(served.tokenizer, told) if told else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**about, "choices": [choice], **blank}

    results: list[GenerationResult] = []
    async with server.asked(request, served, jobs) as ticket:
        async for index, event in ticket.events():
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if isinstance(event, Piece):
                yield chunk(index, {"content": event.text}, event.logprobs)
            elif isinstance(event, Ended):
                results.append(event.outcome)
                if calls := _tool_calls(event.outcome):
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    yield chunk(index, {"tool_calls": numbered})
                yield chunk(index, {}, event.logprobs, finish_reason(event.outcome))
    if wants_usage(body):
        yield {**about, "choices": [], "usage": usage(results, len(results))}


def _jobs(server: Server, body: ChatRequest) -> tuple[Served, list[Generation]]:
    """(the model, the answers that are asked of it). Raises ApiError."""
    served = server.find(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid(
            "max_tokens and max_completion_tokens are two names of one; give one", "max_tokens"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    options = several_options(body)
    options["max_tokens"] = server.most_tokens(served, name, getattr(body, name))
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    if isinstance(body.response_format, JsonObjectFormat):
        options["schema"] = {"type": "object"}
    elif isinstance(body.response_format, JsonSchemaFormat):
        options["schema"] = body.response_format.json_schema.schema_
    if body.tools is not None:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    choice = body.tool_choice
    if choice is not None:
        options["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
    return served, generations(read_messages(body.messages), options, body.n)


def _about(served: Served, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()),
        "model": served.name,
    }  # fmt: skip


def _message(result: GenerationResult) -> dict[str, Any]:
    calls = _tool_calls(result)
    said = {"role": "assistant", "content": None if calls else result.text, "refusal": None}
    return {**said, "tool_calls": calls} if calls else said


def _tool_calls(result: GenerationResult) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {
            "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        for call in result.calls
    ]  # fmt: skip


def _logprobs(served: Served, body: ChatRequest, result: GenerationResult) -> Any:
    return chat_logprobs(served.tokenizer, result.logprobs) if body.logprobs else None
