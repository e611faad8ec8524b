"""Between OpenAI's messages and ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gemma_multi.serving.errors import invalid
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
    waiting: dict[str, int] = {}  # calls without a result, and their places among the results
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                raise invalid(
                    f"{where}.tool_call_id is {message.tool_call_id!r}, which is no call of the "
                    "message before that waits for a result",
                    f"{where}.tool_call_id",
                )
            place = waiting.pop(message.tool_call_id)
            found[-1]["content"][place] = _value(plain_text(message.content))
        elif waiting:
            raise invalid(
                f"{where} has the role {message.role!r}, but the call {next(iter(waiting))!r} "
                "waits for the message of its tool",
                f"{where}.role",
            )
        elif isinstance(message, AssistantMessage) and message.tool_calls:
            found.append({"role": "model", "calls": _calls(message, message.tool_calls, where)})
            found.append({"role": "tool", "content": [None] * len(message.tool_calls)})
            waiting = {call.id: place for place, call in enumerate(message.tool_calls)}
        elif isinstance(message, SystemMessage):
            text = plain_text(message.content)
            if len(found) == 1 and found[0]["role"] == "system":
                found[0]["content"] += f"\n\n{text}"
            else:
                found.append({"role": "system", "content": text})
        else:
            found.append({"role": message.role, "content": plain_text(message.content)})
    if waiting:
        raise invalid(
            f"the call {next(iter(waiting))!r} waits for the message of its tool", "messages"
        )
    return found


def _calls(message: AssistantMessage, calls: Sequence[ToolCall], where: str) -> list[Any]:
    if plain_text(message.content):
        raise invalid(
            f"{where} has both content and tool_calls; an answer here is one of them",
            f"{where}.content",
        )
    if len({call.id for call in calls}) < len(calls):
        raise invalid(f"{where}.tool_calls has an id twice", f"{where}.tool_calls")
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    text = call.function.arguments
    arguments = _value(text)
    if not isinstance(arguments, dict):
        raise invalid(
            f"{where}.function.arguments is {text!r}, expected the text of a JSON object",
            f"{where}.function.arguments",
        )
    return {"name": call.function.name, "arguments": arguments}


def _value(text: str) -> Any:
    """What a tool said: the value of a JSON text, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
