"""TaskPrompt: an instruction and examples around the texts of a task.

As a conversation, the examples are earlier turns and the instruction stands in front of the first,
as system text does. `raw=True` writes them as one plain text instead, which base models (that were
never taught to answer) go on with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.chat_template import Message, with_system
from gemma_multi.errors import OptionError
from gemma_multi.prefixes import shared_beginning

if TYPE_CHECKING:
    from gemma_multi.model import Model


@dataclass(frozen=True)
class TaskPrompt:
    instruction: str
    examples: tuple[tuple[str, str], ...]  # (text, answer)
    raw: bool
    heading: str  # what an answer is called where prompts are plain text

    def ids(self, model: Model, text: str | list[Message]) -> list[int]:
        """The prompt for one text, up to where its answer begins; or for a conversation, which is
        asked as it stands."""
        if isinstance(text, list):
            return model.encode(self.as_it_stands(text), raw=self.raw)
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"the text is {text!r}, expected some words")
        if self.raw:
            answered = [self._block(given, f" {answer}") for given, answer in self.examples]
            parts = [self.instruction, *answered, self._block(text, "")]
            return model.encode("\n\n".join(parts), raw=True)
        messages = [{"role": "system", "content": self.instruction}]
        for given, answer in self.examples:
            messages.append({"role": "user", "content": given})
            messages.append({"role": "model", "content": answer})
        return model.encode([*messages, {"role": "user", "content": text}])

    def as_it_stands(self, messages: list[Message]) -> str | Sequence[Message]:
        """What `generate` takes for a conversation: without the examples, the instruction in front
        if there is one. Raises OptionError for what is no single question with `raw`."""
        if not self.raw:
            return with_system(self.instruction, messages)
        if len(messages) != 1:
            raise OptionError("as plain text only a single question can be asked, without turns")
        return "\n\n".join(filter(None, (self.instruction, messages[0]["content"])))

    def answer_ids(self, model: Model, answer: str) -> list[int]:
        """An answer as the model would write it after the prompt."""
        return model.tokenizer.encode(f" {answer}" if self.raw else answer)

    def shared(self, model: Model) -> int:
        """How many tokens of every prompt are the same."""
        return shared_beginning(self.ids(model, "A"), self.ids(model, "7"))

    def _block(self, text: str, answer: str) -> str:
        return f"Text: {text.strip()}\n{self.heading}:{answer}"


def read_choices(examples: Any, what: str, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Examples whose answers are among `names`."""
    pairs = read_examples(examples)
    for _, answer in pairs:
        if answer not in names:
            raise OptionError(f"an example has the {what} {answer!r}, expected one of {names}")
    return tuple(pairs)


def read_examples(examples: Any) -> list[tuple[str, Any]]:
    """(text, answer) pairs, which may come as a dict. Raises OptionError."""
    pairs = examples.items() if isinstance(examples, Mapping) else examples or ()
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise OptionError(f"examples are {examples!r}, expected pairs of a text and its answer")
    checked: list[tuple[str, Any]] = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise OptionError(f"examples hold {pair!r}, expected pairs of a text and its answer")
        text, answer = pair
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"examples hold the text {text!r}, expected some words")
        checked.append((text, answer))
    return checked


def read_instruction(instruction: Any, default: str) -> str:
    if instruction is None:
        return default
    if not isinstance(instruction, str) or not instruction.strip():
        raise OptionError(f"instruction is {instruction!r}, expected some words")
    return instruction


def read_texts(texts: Any, what: str) -> tuple[list[str], bool]:
    """(texts, whether there was only one)."""
    if isinstance(texts, str):
        return [texts], True
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Sequence):
        raise OptionError(f"{what} is {texts!r}, expected a text or a list of texts")
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(f"{what} holds {text!r}, expected texts")
    return list(texts), False
