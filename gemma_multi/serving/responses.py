"""POST /v1/responses: the same answers in OpenAI's newer shape, one output item or one a call."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gemma_multi.generation import GenerationResult
from gemma_multi.serving.answers import finish_reason
from gemma_multi.serving.app import Chunks, Served, Server, sse
from gemma_multi.serving.messages import read_messages
from gemma_multi.serving.requests import (
    AssistantMessage,
    FunctionCall,
    InputCall,
    InputCallOutput,
    InputMessage,
    JsonObjectFormat,
    Message,
    ResponseRequest,
    ResponseSchemaFormat,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gemma_multi.serving.tickets import Ended, Generation, Piece

FIELDS = set(ResponseRequest.model_fields)


async def responses(server: Server, body: ResponseRequest, request: Request) -> Response:
    if body.stream:
        # the last event says that it is the last
        return await sse(_events(server, body, request), FIELDS, "input", last=None)
    served, job = _job(server, body)
    (result,) = await server.results(request, served, [job])
    return JSONResponse(_whole(_about(served, body), result, _items(result)))


async def _events(server: Server, body: ResponseRequest, request: Request) -> Chunks:
    """The events of an answer, numbered: a text's piece by piece, calls as they are whole."""
    served, job = _job(server, body)
    about = _about(served, body)
    number = -1

    def event(kind: str, **data: Any) -> tuple[str, dict[str, Any]]:
        nonlocal number
        number += 1
        return kind, {"type": kind, "sequence_number": number, **data}

    begun = {**about, "status": "in_progress", "output": [], "usage": None}
    item = _id("msg")
    place = {"item_id": item, "output_index": 0, "content_index": 0}
    spoke = False
    async with server.asked(request, served, [job]) as ticket:
        async for _, what in ticket.events():
            if number < 0:
                yield event("response.created", response=begun)
                yield event("response.in_progress", response=begun)
            if isinstance(what, Piece):
                if not spoke:
                    spoke = True
                    empty = _text_item(item, "in_progress", [])
                    yield event("response.output_item.added", output_index=0, item=empty)
                    yield event("response.content_part.added", **place, part=_part(""))
                yield event("response.output_text.delta", **place, delta=what.text, logprobs=[])
                continue
            assert isinstance(what, Ended)
            result: GenerationResult = what.outcome
            items = _items(result, item)
            if spoke:
                text = result.text
                yield event("response.output_text.done", **place, text=text, logprobs=[])
                yield event("response.content_part.done", **place, part=_part(text))
                yield event("response.output_item.done", output_index=0, item=items[0])
            else:
                for i, one in enumerate(items):
                    yield event("response.output_item.added", output_index=i, item=one)
                    if one["type"] == "function_call":
                        at = {"item_id": one["id"], "output_index": i}
                        said = one["arguments"]
                        yield event("response.function_call_arguments.delta", **at, delta=said)
                        yield event("response.function_call_arguments.done", **at,
                                    name=one["name"], arguments=said)  # fmt: skip
                    yield event("response.output_item.done", output_index=i, item=one)
            whole = _whole(about, result, items)
            yield event(f"response.{whole['status']}", response=whole)


def _job(server: Server, body: ResponseRequest) -> tuple[Served, Generation]:
    """(the model, the answer that is asked of it). Raises ApiError."""
    served = server.find(body.model)
    most = server.most_tokens(served, "max_output_tokens", body.max_output_tokens)
    options = {**body.sampling(), "max_tokens": most}
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, JsonObjectFormat):
        options["schema"] = {"type": "object"}
    elif isinstance(wanted, ResponseSchemaFormat):
        options["schema"] = wanted.schema_
    if body.tools is not None:
        options["tools"] = [tool.model_dump(exclude={"type"}, exclude_none=True)
                            for tool in body.tools]  # fmt: skip
    choice = body.tool_choice
    if choice is not None:
        options["tool_choice"] = choice if isinstance(choice, str) else choice.name
    return served, Generation(read_messages(_messages(body)), options)


def _messages(body: ResponseRequest) -> list[Message]:
    """The input as a chat's messages: calls that follow each other are one message."""
    found: list[Message] = []
    if body.instructions:
        found.append(SystemMessage(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*found, UserMessage(role="user", content=body.input)]
    for one in body.input:
        if isinstance(one, InputCall):
            call = ToolCall(
                id=one.call_id, type="function",
                function=FunctionCall(name=one.name, arguments=one.arguments),
            )  # fmt: skip
            last = found[-1] if found else None
            if isinstance(last, AssistantMessage) and last.tool_calls:
                last.tool_calls.append(call)
            else:
                found.append(AssistantMessage(role="assistant", tool_calls=[call]))
        elif isinstance(one, InputCallOutput):
            found.append(ToolMessage(role="tool", content=one.output, tool_call_id=one.call_id))
        else:
            found.append(_message(one))
    return found


def _message(one: InputMessage) -> Message:
    text = one.content if isinstance(one.content, str) else "".join(p.text for p in one.content)
    if one.role == "user":
        return UserMessage(role="user", content=text)
    if one.role == "assistant":
        return AssistantMessage(role="assistant", content=text)
    return SystemMessage(role=one.role, content=text)


def _about(served: Served, body: ResponseRequest) -> dict[str, Any]:
    """What every response says, of itself and of what was asked."""
    given = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "id": _id("resp"), "object": "response", "created_at": int(time.time()),
        "model": served.name, "error": None, "instructions": body.instructions, "metadata": {},
        "max_output_tokens": body.max_output_tokens, "parallel_tool_calls": True,
        "previous_response_id": None, "store": False, "temperature": body.temperature,
        "top_p": body.top_p, "tools": given.get("tools", []),
        "tool_choice": given.get("tool_choice", "auto"),
        "text": given.get("text", {"format": {"type": "text"}}), "truncation": "disabled",
    }  # fmt: skip


def _whole(
    about: Mapping[str, Any], result: GenerationResult, items: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    cut = finish_reason(result) == "length"
    return {
        **about,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": list(items),
        "usage": {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.reused_tokens},
            "output_tokens": result.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": result.prompt_tokens + result.generated_tokens,
        },
    }


def _items(result: GenerationResult, name: str | None = None) -> list[dict[str, Any]]:
    """An item for each call, or one for the text, which is called `name`."""
    calls = [
        {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": call.name,
         "arguments": json.dumps(call.arguments, ensure_ascii=False), "status": "completed"}
        for call in result.calls
    ]  # fmt: skip
    status = "incomplete" if finish_reason(result) == "length" else "completed"
    return calls or [_text_item(name or _id("msg"), status, [_part(result.text)])]


def _text_item(name: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "assistant", "status": status,
            "content": content}  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"
