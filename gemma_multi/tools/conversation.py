"""A conversation with calls and their results as token ids to learn from.

Turns are `("user", text)`, `("model", text)`, `("calls", Calls)` and `("tool", results)`. The model
says its texts and its calls, and what ends its answer: `<end_of_turn>`, or after FunctionGemma's
calls the token that begins a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_multi import chat_template
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools.format import tool_format
from gemma_multi.tools.tool import Tool

Turn = tuple[str, Any]


def encode_with_tools(
    tokenizer: Tokenizer, turns: Sequence[Turn], tools: Sequence[Tool], system: str = ""
) -> tuple[list[int], list[bool]]:
    """(ids, which of them the model says), up to the end of its last answer."""
    speaks = tool_format(tokenizer)
    opening, system = speaks.opening(tokenizer, tools, system)
    end_of_turn, *line_break = chat_template.close_turn(tokenizer)
    parts: list[tuple[list[int], bool]] = [([tokenizer.bos_id, *opening], False)]
    calls: Any = ()
    for i, (kind, value) in enumerate(turns):
        last = i + 1 == len(turns)
        if kind == "user":
            text = chat_template.user_text(value, "" if i else system)
            turn = chat_template.encode_turn(tokenizer, "user", text)
            parts.append((turn + chat_template.open_turn(tokenizer, "model"), False))
        elif kind == "tool":
            # of a response in the model's own turn it opens the first itself
            response = speaks.response(tokenizer, calls, value)
            opened = 1 if speaks.in_one_turn else 0
            parts += [(response[:opened], True), (response[opened:], False)]
        else:
            calls = value if kind == "calls" else ()
            said = speaks.calls(tokenizer, calls, tools) if calls else tokenizer.encode(value)
            if kind == "model" or not speaks.in_one_turn:
                parts += [([*said, end_of_turn], True), ([] if last else line_break, False)]
            else:
                opens = speaks.response(tokenizer, calls[:1], [{}])[:1] if last else []
                parts.append((said + opens, True))
    ids = [token for part, _ in parts for token in part]
    return ids, [said for part, said in parts for _ in part]
