"""The prompts that engines are compared on: our own set, a file, or a caller's.

The shipped set (`prompts.jsonl`) holds jobs for small models, 23 languages, code, numbers, emoji,
odd spaces, empty and forged turns, conversations, and texts longer than a window of 512 tokens.
One line is one prompt: `messages` for a conversation, or `text` to continue as it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.chat_template import fold_system
from gemma_multi.errors import OptionError

SHIPPED = Path(__file__).with_name("prompts.jsonl")
_KEYS = {"name", "kind", "language", "messages", "text"}


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a conversation, or plain text to continue."""

    name: str
    content: str | tuple[Mapping[str, str], ...]
    kind: str = "given"
    language: str = "und"  # BCP 47; "zxx" for no language, "mul" for several
    only_answer: bool = False  # compare logits where the model speaks, not inside of what it reads

    @property
    def raw(self) -> bool:
        return isinstance(self.content, str)


def shipped_prompts() -> list[Prompt]:
    return _read_jsonl(SHIPPED)


def choose_prompts(given: Any) -> list[Prompt]:
    """Prompts as a caller may give them: None for the shipped set, a `.jsonl` or `.txt` file (one
    prompt a line), or a list of texts (one user turn each), messages, or `Prompt`s.

    Raises OptionError for an empty set and for what is no prompt.
    """
    if given is None:
        return shipped_prompts()
    if isinstance(given, str | Path):
        prompts = _read_file(Path(given))
    elif isinstance(given, Sequence):
        prompts = [_as_prompt(i, item) for i, item in enumerate(given)]
    else:
        raise OptionError(f"prompts is a {type(given).__name__}, expected a list or a file")
    if not prompts:
        raise OptionError(
            "the prompt set is empty; engines that were asked nothing agree on nothing"
        )
    for name, count in Counter(prompt.name for prompt in prompts).items():
        if count > 1:
            raise OptionError(f"two prompts are called {name!r}")
    return prompts


def _read_file(path: Path) -> list[Prompt]:
    if path.suffix == ".jsonl":
        return _read_jsonl(path)
    if path.suffix != ".txt":
        raise OptionError(f"{path}: prompts come as .jsonl or .txt files")
    lines = [line for line in _text_of(path).split("\n") if line.strip()]
    return [_as_prompt(i, line) for i, line in enumerate(lines)]


def _read_jsonl(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_from_entry(json.loads(line), f"prompt-{number}"))
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{path}, line {number}: {error}") from error
    return prompts


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"{path}: prompts cannot be read: {reason}") from error


def _from_entry(entry: Any, name: str) -> Prompt:
    if not isinstance(entry, dict) or ("messages" in entry) == ("text" in entry):
        raise OptionError("expected an object with either 'messages' or 'text'")
    if unknown := sorted(set(entry) - _KEYS):
        raise OptionError(
            f"unknown key {unknown[0]!r}, expected some of {', '.join(sorted(_KEYS))}"
        )
    labels = {key: entry[key] for key in ("kind", "language") if key in entry}
    name = entry.get("name", name)
    for label in (name, *labels.values()):
        if not isinstance(label, str):
            raise OptionError(f"{label!r} is no text")
    if "text" in entry:
        if not isinstance(entry["text"], str) or not entry["text"]:
            raise OptionError(f"text is {entry['text']!r}, expected some text")
        return Prompt(name, entry["text"], **labels)
    return Prompt(name, _conversation(entry["messages"]), **labels)


def _as_prompt(i: int, item: Any) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        if not item.strip():
            raise OptionError(f"prompt {i} is empty; give it some text")
        return Prompt(f"prompt-{i + 1}", ({"role": "user", "content": item},))
    return Prompt(f"prompt-{i + 1}", _conversation(item))


def _conversation(messages: Any) -> tuple[Mapping[str, str], ...]:
    fold_system(messages)  # checks
    return tuple(messages)
