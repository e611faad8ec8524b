"""Constraint: what a text must be, compiled. Matcher: how far one answer has come in it.

llguidance does the work: it parses the grammar over our tokens' bytes (`vocabulary`) and says which
tokens may come next in some hundredths of a millisecond, over 262,144 of them.

Design choices:
- JSON has the spaces that Python's `json.dumps` writes and no others, unless asked for: a small
  model that may write a line break writes them until its tokens are spent, and rows that it was
  fine-tuned on most likely look like that.
- Tokens that must come are given as one run (`forced`), tokenised as a prompt would be, so that a
  driver reads them all at once.
- Work is bounded: the library's limits on a grammar's size and on a step's parsing end in an
  OptionError, not in a process that hangs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.constraints.vocabulary import llguidance_tokenizer
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# llguidance's options for JSON as `json.dumps` writes it
JSON_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Constraint:
    """What a text must be."""

    kind: str  # of option it came from, for people
    grammar: str  # llguidance's
    parse: Callable[[Tokenizer, Sequence[int]], Any]  # makes a value of a finished text's tokens
    # whether a text that begins with this token is for programs alone, and not shown as it comes
    is_silent: Callable[[Tokenizer, int], bool] = lambda tokenizer, token: False

    @classmethod
    def of_schema(
        cls, schema: dict[str, Any], parse: Callable[[str], Any] = json.loads,
        whitespace: bool = False,
    ) -> Constraint:  # fmt: skip
        matcher = _llguidance()
        spaces: Any = {"whitespace_flexible": True} if whitespace else JSON_SPACES
        try:
            grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides=spaces)
        except ValueError as error:
            raise OptionError(f"schema cannot be obeyed: {error}") from error
        return cls("schema", grammar, _of_text(parse))

    @classmethod
    def of_choices(cls, texts: Collection[str]) -> Constraint:
        rules = " | ".join(map(json.dumps, texts))  # Lark quotes as JSON does
        return cls("choices", _llguidance().grammar_from_lark(f"start: {rules}"), _of_text(str))

    @classmethod
    def of_regex(cls, pattern: str) -> Constraint:
        return cls("regex", _llguidance().grammar_from_regex(pattern), _of_text(str))

    @classmethod
    def of_grammar(cls, lark: str) -> Constraint:
        return cls("grammar", _llguidance().grammar_from_lark(lark), _of_text(str))

    @classmethod
    def of_tools(
        cls, lark: str, parse: Callable[[Tokenizer, Sequence[int]], Any],
        is_call: Callable[[Tokenizer, int], bool],
    ) -> Constraint:  # fmt: skip
        """A text or calls, which `parse` reads; `is_call` tells them apart by the first token."""
        return cls("tools", _llguidance().grammar_from_lark(lark), parse, is_call)

    def matcher(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> Matcher:
        """For one answer. Raises OptionError for what the grammar's language does not allow."""
        found = _llguidance()(
            llguidance_tokenizer(tokenizer, frozenset(stop_ids)), self.grammar, log_level=0
        )
        if found.is_error():
            raise OptionError(f"{self.kind} cannot be obeyed: {_reason(found.get_error())}")
        return Matcher(found, self, tokenizer.vocab_size)


class Matcher:
    """A constraint, and how far one answer has come in it."""

    def __init__(self, matcher: LLMatcher, constraint: Constraint, vocabulary: int) -> None:
        self.constraint = constraint
        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)
        self._allowed: np.ndarray | None = None  # until the next token

    @property
    def finished(self) -> bool:
        """Whether the text is whole, and nothing more may follow."""
        self._check()
        return self._matcher.is_stopped()

    @property
    def accepting(self) -> bool:
        """Whether the text is whole."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever a model would say."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        if not tokens and np.count_nonzero(self.allowed()) == 1:
            return np.flatnonzero(self.allowed()).tolist()
        return tokens

    def allowed(self) -> np.ndarray:
        """Where a token may come next: `bool[vocabulary]`. Stop tokens may where the text is
        whole."""
        if self._allowed is None:
            bits = self._bits
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            self._check()
            flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
            self._allowed = flags[: self._vocabulary].view(bool)
        return self._allowed

    def take(self, token: int) -> None:
        """Follows a token that was allowed."""
        self._allowed = None
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _reason(self._matcher.get_error())
            raise OptionError(f"{self.constraint.kind} could not be followed: {reason}")


def _of_text(parse: Callable[[str], Any]) -> Callable[[Tokenizer, Sequence[int]], Any]:
    return lambda tokenizer, tokens: parse(tokenizer.decode(tokens))


def _reason(message: str) -> str:
    """The part of llguidance's message that says what is wrong, on one line."""
    lines = [line.strip() for line in message.split("<state>")[0].splitlines()]
    said = [line for line in lines if line and not set(line) <= set("^ ")]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return errors[0] if errors else said[0]


def _llguidance() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise BackendError("constrained text needs llguidance: pip install llguidance") from None
    return LLMatcher
