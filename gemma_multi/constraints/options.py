"""ConstraintOptions: what a caller may ask a text to be, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from gemma_multi.constraints.constraint import Constraint
from gemma_multi.constraints.schema import read_schema
from gemma_multi.errors import OptionError
from gemma_multi.options import option
from gemma_multi.sentencepiece_model import SPACE

MAX_CHOICES = 10_000


@dataclass(frozen=True)
class ConstraintOptions:
    """What a text must be; one of these at most. What a field means stands beside it."""

    schema: object = option(
        None, "JSON that fits this JSON Schema: its text, or in Python also a dict, a pydantic "
        "model, a dataclass or a TypedDict."
    )  # fmt: skip
    choices: Sequence[str] = option((), "One of these texts; may be repeated.")
    regex: str | None = option(None, "A text that matches this regular expression as a whole.")
    grammar: str | None = option(None, "A text of this Lark grammar, from its rule `start`.")
    whitespace: bool = option(False, "Let JSON of a schema have spaces and line breaks anywhere.")

    def compile(self) -> Constraint | None:
        """The constraint, or None for none. Raises OptionError for what is none of these. What is
        wrong inside of a regex or a grammar is said when it is first followed."""
        given = [f.name for f in fields(self) if f.name != "whitespace" and self._has(f.name)]
        if len(given) > 1:
            raise OptionError(f"a text cannot have both {given[0]} and {given[1]}; give one")
        if not isinstance(self.whitespace, bool):
            raise OptionError(f"whitespace is {self.whitespace!r}, expected True or False")
        if self.whitespace and given != ["schema"]:
            raise OptionError("whitespace=True is for JSON, and needs a schema")
        if not given:
            return None
        return getattr(self, f"_of_{given[0]}")()

    def _has(self, name: str) -> bool:
        value = getattr(self, name)
        return value is not None and not (name == "choices" and value == ())

    def _of_schema(self) -> Constraint:
        schema, parse = read_schema(self.schema)
        return Constraint.of_schema(schema, parse, self.whitespace)

    def _of_choices(self) -> Constraint:
        return Constraint.of_choices(check_choices("choices", self.choices))

    def _of_regex(self) -> Constraint:
        if not isinstance(self.regex, str) or not self.regex:
            raise OptionError(f"regex is {self.regex!r}, expected a pattern")
        return Constraint.of_regex(self.regex)

    def _of_grammar(self) -> Constraint:
        if not isinstance(self.grammar, str) or not self.grammar.strip():
            raise OptionError(f"grammar is {self.grammar!r}, expected the text of a Lark grammar")
        return Constraint.of_grammar(self.grammar)


def check_choices(name: str, texts: Any, most: int = MAX_CHOICES) -> list[str]:
    """Different texts that are not empty and that UTF-8 can hold."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise OptionError(f"{name} is {texts!r}, expected a list of texts")
    if not texts:
        raise OptionError(f"{name} is empty, expected at least one text")
    if len(texts) > most:
        raise OptionError(f"{name} has {len(texts)} texts, expected at most {most}")
    seen: set[str] = set()
    for text in texts:
        if not isinstance(text, str) or not text:
            raise OptionError(f"{name} holds {text!r}, expected texts that are not empty")
        if SPACE in text:
            raise OptionError(f"{name} holds {text!r}: U+2581 is how tokenizers spell a space")
        if text in seen:
            raise OptionError(f"{name} holds {text!r} twice")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise OptionError(f"{name} holds {text!r}, which is no Unicode text") from None
        seen.add(text)
    return list(texts)
