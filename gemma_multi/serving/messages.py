"""Between OpenAI's messages and ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gemma_multi.serving.errors import ApiError
from gemma_multi.serving.requests import (
    AssistantMessage,
    Content,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
)


def plain_text(content: Content | None) -> str:
    """A text, or the texts of its parts one after the other."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def read_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As `Model.stream` takes them: system messages that come first are one, and the results of
    an answer's calls as well, in the order of the calls."""
    found: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls that have no result yet, in order
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                raise ApiError(
                    400, f"{where}.tool_call_id is {message.tool_call_id!r}, which is no call of "
                    "the message before that waits for a result",
                    param=f"{where}.tool_call_id", code="invalid_value",
                )  # fmt: skip
            place = found[-1]["ids"].index(message.tool_call_id)
            waiting.remove(message.tool_call_id)
            found[-1]["content"][place] = _value(plain_text(message.content))
            continue
        if waiting:
            raise ApiError(
                400, f"{where} has the role {message.role!r}, but the call {waiting[0]!r} waits "
                "for the message of its tool", param=f"{where}.role", code="invalid_value",
            )  # fmt: skip
        if isinstance(message, AssistantMessage) and message.tool_calls:
            if plain_text(message.content):
                raise ApiError(
                    400, f"{where} has both content and tool_calls; an answer here is one of them",
                    param=f"{where}.content", code="invalid_value",
                )  # fmt: skip
            calls = [_call(call, f"{where}.tool_calls[{j}]")
                     for j, call in enumerate(message.tool_calls)]  # fmt: skip
            waiting = [call.id for call in message.tool_calls]
            if len(set(waiting)) < len(waiting):
                raise ApiError(
                    400, f"{where}.tool_calls has an id twice", param=f"{where}.tool_calls",
                    code="invalid_value",
                )  # fmt: skip
            found.append({"role": "model", "calls": calls})
            found.append({"role": "tool", "content": [None] * len(calls), "ids": list(waiting)})
        elif isinstance(message, SystemMessage):
            text = plain_text(message.content)
            if len(found) == 1 and found[0]["role"] == "system":
                found[0]["content"] += f"\n\n{text}"
            else:
                found.append({"role": "system", "content": text})
        else:
            found.append({"role": message.role, "content": plain_text(message.content)})
    if waiting:
        raise ApiError(
            400, f"the call {waiting[0]!r} waits for the message of its tool", param="messages",
            code="invalid_value",
        )  # fmt: skip
    for one in found:
        one.pop("ids", None)
    return found


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    return {
        "name": call.function.name,
        "arguments": read_object(call.function.arguments, f"{where}.function.arguments"),
    }


def read_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object that a client wrote as a text. Raises ApiError."""
    value = _value(text)
    if not isinstance(value, dict):
        raise ApiError(
            400, f"{where} is {text[:200]!r}, expected the text of a JSON object", param=where,
            code="invalid_value",
        )  # fmt: skip
    return value


def _value(text: str) -> Any:
    """What a tool said: the value of a JSON text, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
