"""Calls for a Gemma that has no tokens for them: told in words, answered in JSON.

An answer that begins with `[` is a list of calls, and any other is text; the grammar lets nothing
between the two through, so no call is ever half a call.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gemma_multi import chat_template
from gemma_multi.constraints import JSON_SPACES, Constraint
from gemma_multi.constraints.schema import write_json
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools.format import ToolFormat, chosen
from gemma_multi.tools.tool import Call, Tool

_TOLD = """You can call these functions:
{}
To call one or more of them, answer with nothing but a JSON list such as
[{{"name": "a_function", "arguments": {{"an_argument": 1}}}}]"""


def declaration(tools: Sequence[Tool]) -> str:
    """The system text that declares functions."""
    declared = (
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        for tool in tools
    )
    return _TOLD.format("\n".join(write_json(one, fallback=str) for one in declared))


def calls_schema(tools: Sequence[Tool], most: int) -> dict[str, Any]:
    """The JSON Schema of an answer of one to `most` calls."""
    return {"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": [
        {"type": "object", "properties": {
            "name": {"const": tool.name}, "arguments": tool.parameters,
        }, "required": ["name", "arguments"], "additionalProperties": False} for tool in tools
    ]}}  # fmt: skip


class JsonFormat(ToolFormat):
    in_one_turn = False

    def opening(
        self, tokenizer: Tokenizer, tools: Sequence[Tool], system: str
    ) -> tuple[list[int], str]:
        told = declaration(tools)
        return [], f"{system}\n\n{told}" if system else told

    def constraint(self, tools: Sequence[Tool], choice: str) -> Constraint:
        may, how, most = chosen(tools, choice)
        calls = {**calls_schema(may, most), "x-guidance": JSON_SPACES}
        rules = [r"text: /[^\[](?s:.*)/", f"calls: %json {json.dumps(calls)}"]
        start = {"auto": "calls | text", "required": "calls", "none": "text"}[how]
        if how == "none":
            rules.pop()
        grammar = "\n".join([f"start: {start}", *rules])
        return Constraint.of_tools(grammar, _parse, lambda tokenizer, token: (
            tokenizer.token_bytes(token).startswith(b"[")))  # fmt: skip

    def calls(
        self, tokenizer: Tokenizer, calls: Sequence[Call], tools: Sequence[Tool]
    ) -> list[int]:
        forms = {tool.name: tool.parameters for tool in tools}
        told = [{"name": c.name, "arguments": _in_order(c.arguments, forms[c.name])} for c in calls]
        return tokenizer.encode(write_json(told, fallback=str))

    def response(
        self, tokenizer: Tokenizer, calls: Sequence[Call], results: Sequence[Any]
    ) -> list[int]:
        told = [{"name": c.name, "result": r} for c, r in zip(calls, results, strict=True)]
        turn = chat_template.encode_turn(
            tokenizer, "user", f"Results: {write_json(told, fallback=str)}"
        )
        return turn + chat_template.open_turn(tokenizer, "model")


def _parse(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[Call, ...]:
    text = tokenizer.decode(tokens)
    if not text.startswith("["):
        return ()
    return tuple(Call(one["name"], one["arguments"]) for one in json.loads(text))


def _in_order(value: Any, schema: Any) -> Any:
    """A value with the keys of its objects in the order in which its schema names them."""
    if isinstance(value, list) and isinstance(schema, dict):
        return [_in_order(inner, schema.get("items")) for inner in value]
    if not isinstance(value, dict) or not isinstance(schema, dict):
        return value
    named = schema.get("properties", {})
    keys = [*(key for key in named if key in value), *(key for key in value if key not in named)]
    return {key: _in_order(value[key], named.get(key)) for key in keys}
