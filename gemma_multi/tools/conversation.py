"""A conversation with calls and their results: read from messages, and as token ids.

In messages, one of the model may have `calls` for its content, and then one of the role `tool`
follows whose content is what they gave, in order. As turns they are `("user", text)`,
`("model", text)`, `("calls", Calls)` and `("tool", results)`. The model says its texts and its
calls, and what ends its answer: `<end_of_turn>`, or after FunctionGemma's calls the token that
begins a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_multi import chat_template
from gemma_multi.errors import OptionError
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.tools.format import tool_format
from gemma_multi.tools.tool import Call, Tool

Turn = tuple[str, Any]
# what may follow a turn
_AFTER = {"": ("user",), "user": ("model", "calls"), "calls": ("tool",), "model": ("user",),
          "tool": ("model", "calls")}  # fmt: skip


def has_calls(messages: Any) -> bool:
    """Whether messages hold calls or what they gave, which only `read_conversation` reads."""
    return not isinstance(messages, str) and any(
        isinstance(one, Mapping) and ("calls" in one or one.get("role") == "tool")
        for one in messages
    )


def read_conversation(messages: Any, tools: Sequence[Tool]) -> tuple[str, list[Turn]]:
    """(system text, turns). Raises OptionError for what is no conversation with these tools."""
    if not isinstance(messages, list | tuple) or not messages:
        raise OptionError("'messages' is empty or no list, expected {'role', 'content'} objects")
    system, rest = chat_template.split_system(messages)
    known = {tool.name: tool for tool in tools}
    turns: list[Turn] = []
    for i, message in enumerate(rest):
        before = turns[-1] if turns else ("", "")
        turn = _turn(i, message, before[1], known)
        if turn[0] not in _AFTER[before[0]]:
            expected = " or ".join(_AFTER[before[0]])
            raise OptionError(f"message {i} is of {turn[0]!r}, but it is the turn of {expected}")
        turns.append(turn)
    return system, turns


def encode_after_calls(
    tokenizer: Tokenizer, messages: Any, tools: Sequence[Tool]
) -> tuple[list[int], list[int]]:
    """(the ids of a conversation that the model is to go on with, those up to its last turn).
    Raises OptionError."""
    system, turns = read_conversation(messages, tools)
    if turns[-1][0] not in ("user", "tool"):
        raise OptionError("messages must end with a user's turn, or a tool's, to be answered")
    ids, _ = encode_with_tools(tokenizer, turns, tools, system)
    before, _ = encode_with_tools(tokenizer, turns[:-1], tools, system)
    return ids, before


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


def _turn(i: int, message: Any, before: Any, tools: Mapping[str, Tool]) -> tuple[str, Any]:
    """A message as (user|model|calls|tool, its content)."""
    keys = set(message) if isinstance(message, Mapping) else set()
    role = chat_template.ROLES.get(message["role"], message["role"]) if "role" in keys else None
    silent = keys == {"role", "calls"} or (
        keys == {"role", "calls", "content"} and message["content"] == ""  # as in a chat's messages
    )
    if role == "model" and silent:
        calls = message["calls"]
        if not isinstance(calls, list | tuple) or not calls:
            raise OptionError(f"message {i}: 'calls' is empty or no list")
        return "calls", tuple(_call(i, call, tools) for call in calls)
    if keys != {"role", "content"}:
        raise OptionError(
            f"message {i} is {message!r}, expected 'role' and 'content', or of a model 'calls'"
        )
    content = message["content"]
    if role == "tool":
        if not isinstance(content, list | tuple) or len(content) != len(before):
            raise OptionError(f"message {i}: expected a list of {len(before)} results")
        return "tool", list(content)
    if role not in ("user", "model"):
        raise OptionError(f"message {i} has role {message['role']!r}, expected user, model or tool")
    if not isinstance(content, str) or not content.strip():
        raise OptionError(f"message {i}: 'content' is {content!r}, expected some words")
    return role, content.strip()


def _call(i: int, call: Any, tools: Mapping[str, Tool]) -> Call:
    if not isinstance(call, Mapping) or set(call) != {"name", "arguments"}:
        raise OptionError(f"message {i} calls {call!r}, expected 'name' and 'arguments'")
    tool, arguments = tools.get(call["name"]), call["arguments"]
    if tool is None:
        raise OptionError(f"message {i} calls {call['name']!r}, which is not among its tools")
    if not isinstance(arguments, Mapping):
        raise OptionError(f"message {i}: the arguments of {tool.name!r} are {arguments!r}")
    known, required = tool.parameters.get("properties", {}), tool.parameters.get("required", ())
    for name in required:
        if name not in arguments:
            raise OptionError(f"message {i}: a call of {tool.name!r} lacks {name!r}")
    for name in arguments:
        if name not in known:
            raise OptionError(f"message {i}: {tool.name!r} has no parameter {name!r}")
    return Call(tool.name, dict(arguments))
