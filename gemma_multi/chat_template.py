"""Turns to token ids: Gemma's conversation format, as code.

A prompt is `<bos>`, then per turn `<start_of_turn>user|model\\n`, the stripped text,
`<end_of_turn>\\n`, and at the end `<start_of_turn>model\\n`. System text goes in front of the
first user turn with a blank line between, and as it is: Google's template trims what is said in
turns and not this. Text is encoded on its own and spliced in as ids, so no text can forge a turn,
and `<bos>` appears once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_multi.errors import OptionError
from gemma_multi.tokenizer import Tokenizer

Message = Mapping[str, str]
ROLES = {"user": "user", "model": "model", "assistant": "model", "system": "system"}


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], opening: Sequence[int] = ()
) -> list[int]:
    """The ids of a conversation, up to where the model's next turn begins. `opening` are those of
    turns in front of it, in which tools are declared."""
    ids = [tokenizer.bos_id, *opening]
    for role, text in fold_system(messages):
        ids += encode_turn(tokenizer, role, text)
    return ids + open_turn(tokenizer, "model")


def encode_answered(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]]
) -> tuple[list[int], list[bool]]:
    """A whole conversation to learn from: (ids, which of them the model says).

    The model says the text of its turns and the `<end_of_turn>` after it, as it does when it
    generates; the line break behind the last turn is omitted.
    """
    ids, said = [tokenizer.bos_id], [False]
    for role, text in turns:
        turn = encode_turn(tokenizer, role, text)
        before, after = len(turn), 0  # tokens of the turn that the model does not say
        if role == "model":
            before, after = len(open_turn(tokenizer, role)), len(close_turn(tokenizer)) - 1
        said += [False] * before + [True] * (len(turn) - before - after) + [False] * after
        ids += turn
    trailing = len(close_turn(tokenizer)) - 1
    return ids[:-trailing], said[:-trailing]


def encode_turn(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    """One whole turn, from `<start_of_turn>` to the newline after `<end_of_turn>`."""
    if role == "model":  # as it is generated, after the opening
        said = open_turn(tokenizer, role) + tokenizer.encode(text)
    else:  # as one text, for a line break at its beginning may join the one before it
        said = [tokenizer.start_of_turn_id, *tokenizer.encode(f"{role}\n{text}")]
    return said + close_turn(tokenizer)


def user_text(text: str, system: str = "") -> str:
    """What stands in a user's turn, the first one if there is system text."""
    return f"{system}\n\n{text.strip()}" if system else text.strip()


def open_turn(tokenizer: Tokenizer, role: str) -> list[int]:
    return [tokenizer.start_of_turn_id, *tokenizer.encode(f"{role}\n")]


def close_turn(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.end_of_turn_id, *tokenizer.encode("\n")]


def split_system(prompt: str | Sequence[Message]) -> tuple[str, str | Sequence[Message]]:
    """(the system text, the turns after it); what is no conversation is for others to refuse."""
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and prompt:
        role, text = _read(0, prompt[0])
        if role == "system":
            return text, prompt[1:]
    return "", prompt


def with_system(system: str, prompt: str | Sequence[Message]) -> str | Sequence[Message]:
    """The same with a system text in front."""
    if not system:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *turns]


def read_conversation(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Checked messages of a conversation that the user's next turn may follow, with the roles
    that this package uses."""
    if not isinstance(messages, str | Mapping) and isinstance(messages, Sequence) and messages:
        role, _ = _read(len(messages) - 1, messages[-1])
        if role == "user":
            raise OptionError("the conversation ends with a user's turn, expected its answer")
        fold_system([*messages, {"role": "user", "content": "and then"}])
        read = (_read(i, message) for i, message in enumerate(messages))
        return [{"role": role, "content": text} for role, text in read]
    if messages:
        fold_system(messages)  # which says what is wrong
    return []


def fold_system(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Checked (role, text) pairs, user and model in turn: texts as they are encoded, with system
    text folded in."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise OptionError(
            f"messages must be a list of {{'role', 'content'}}, received {type(messages).__name__}"
        )
    turns: list[tuple[str, str]] = []
    system = ""
    for i, message in enumerate(messages):
        role, text = _read(i, message)
        if role == "system":
            if i:
                raise OptionError(f"message {i} is a system message, allowed only as the first")
            system = text
            continue
        expected = "model" if len(turns) % 2 else "user"
        if role != expected:
            raise OptionError(f"message {i} has role {role!r}, but it is the turn of {expected!r}")
        turns.append((role, user_text(text, "" if turns else system)))
    if not turns or turns[-1][0] != "user":
        raise OptionError("messages must end with a user's turn for the model to answer")
    return turns


def _read(i: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise OptionError(f"message {i} is {message!r}, expected the keys 'role' and 'content'")
    role, text = message["role"], message["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise OptionError(f"message {i} has role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise OptionError(f"message {i} has content of type {type(text).__name__}, expected text")
    return ROLES[role], text
