"""POST /v1/chat/completions"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.generation import GenerationResult
from gemma_multi.serving.app import Chunks, Served, Server, sse
from gemma_multi.serving.errors import ApiError
from gemma_multi.serving.messages import read_messages
from gemma_multi.serving.requests import (
    ChatRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Several,
    TextFormat,
)
from gemma_multi.serving.worker import Ended, Generation, Piece

FIELDS = set(ChatRequest.model_fields)


async def chat_completions(server: Server, body: ChatRequest, request: Request) -> Response:
    served = server.find(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are the same; give one",
                       param="max_tokens", code="invalid_value")  # fmt: skip
    server.check_tokens("max_tokens", body.max_tokens)
    server.check_tokens("max_completion_tokens", body.max_completion_tokens)
    options = {
        **several_options(body),
        "max_tokens": body.max_tokens or body.max_completion_tokens,
        **format_options(body.response_format),
    }
    if body.tools is not None:
        options["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    choice = body.tool_choice
    if choice is not None:
        options["tool_choice"] = choice if isinstance(choice, str) else choice.function.name
    prompt = read_messages(body.messages)
    jobs = generations(prompt, options, body.n or 1)
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()),
             "model": served.name}  # fmt: skip
    if body.stream:
        chunks = _chunks(server, request, served, jobs, about, wants_usage(body))
        return await sse(chunks, FIELDS, "messages")
    async with server.asked(request, served, jobs) as ticket:
        results = await ticket.outcomes()
    choices = [
        {"index": i, "message": _message(result), "logprobs": None,
         "finish_reason": finish_reason(result)}
        for i, result in enumerate(results)
    ]  # fmt: skip
    return JSONResponse(
        {**about, "object": "chat.completion", "choices": choices, "usage": usage(results)}
    )


async def _chunks(
    server: Server, request: Request, served: Served, jobs: Sequence[Generation],
    about: Mapping[str, Any], with_usage: bool,
) -> Chunks:  # fmt: skip
    """The deltas of each choice, then usage if it is wanted."""
    about = {**about, "object": "chat.completion.chunk"}
    blank = {"usage": None} if with_usage else {}
    results: list[GenerationResult] = []
    begun: set[int] = set()

    def chunk(index: int, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**about, "choices": [choice], **blank}

    async with server.asked(request, served, jobs) as ticket:
        async for index, event in ticket.events():
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if isinstance(event, Piece):
                yield chunk(index, {"content": event.text})
            elif isinstance(event, Ended):
                results.append(event.outcome)
                if calls := tool_calls(event.outcome):
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    yield chunk(index, {"tool_calls": numbered})
                yield chunk(index, {}, finish_reason(event.outcome))
    if with_usage:
        yield {**about, "choices": [], "usage": usage(results)}


def generations(prompt: Any, options: Mapping[str, Any], n: int) -> list[Generation]:
    """`n` answers to a prompt, each with a seed of its own."""
    seed = options.get("seed")
    return [
        Generation(prompt, options if seed is None else {**options, "seed": (seed + i) % (1 << 64)})
        for i in range(n)
    ]  # fmt: skip


def several_options(body: Several) -> dict[str, Any]:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return {**body.sampling(), **({"stop": stop} if stop else {})}


def wants_usage(body: Several) -> bool:
    """Raises ApiError for options of a stream where there is none."""
    return bool(body.stream_options and body.stream_options.include_usage)


def format_options(
    wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None
) -> dict[str, Any]:  # fmt: skip
    """`response_format` as `ConstraintOptions` take it."""
    if isinstance(wanted, JsonObjectFormat):
        return {"schema": {"type": "object"}}
    if isinstance(wanted, JsonSchemaFormat):
        return {"schema": wanted.json_schema.schema_}
    return {}


def finish_reason(result: GenerationResult) -> str:
    """An answer whose time was up ended for want of room, as one that reached max_tokens did."""
    if result.calls:
        return "tool_calls"
    return "stop" if result.finish_reason == "stop" else "length"


def tool_calls(result: GenerationResult) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {
            "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
        for call in result.calls
    ]  # fmt: skip


def _message(result: GenerationResult) -> dict[str, Any]:
    calls = tool_calls(result)
    said = {"role": "assistant", "content": None if calls else result.text, "refusal": None}
    return {**said, "tool_calls": calls} if calls else said


def usage(results: Sequence[GenerationResult]) -> dict[str, Any]:
    """Tokens; a prompt that several answers share counts once."""
    prompt, said = results[0].prompt_tokens, sum(one.generated_tokens for one in results)
    return {
        "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": results[0].reused_tokens},
    }  # fmt: skip
