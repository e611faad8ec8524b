"""TextStream: tokens become text as they are generated, and stop texts end it.

What may yet turn out to begin a stop text is held back until it is decided, and a character that
spans tokens comes out whole. A constrained text that ends whole becomes a value as well, and one
that does not is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints import Constraint
from gemma_multi.engines import Session
from gemma_multi.errors import ConstraintError, OptionError
from gemma_multi.generation import (
    Decoding,
    GenerationResult,
    PromptLookup,
    Timing,
    generate_tokens,
)
from gemma_multi.sampling import GenerationOptions

if TYPE_CHECKING:
    from gemma_multi.model import Model


class TextStream:
    """Text pieces as they are generated; `result` once they have ended or been cut off."""

    def __init__(
        self, model: Model, session: Session, prompt: Sequence[int], options: GenerationOptions,
        constraint: Constraint | None = None, reused: int = 0,
    ) -> None:  # fmt: skip
        """`prompt` is what `session` has not read; `reused` of the tokens that it has were read for
        another answer."""
        if constraint is not None and options.stop:
            raise OptionError(
                f"a stop text may cut off what {constraint.kind} asks for; give one of the two"
            )
        self._timing = Timing()
        self._prompt_tokens, self._reused = len(prompt) + session.length, reused
        self._text: list[str] = []
        self._constraint, self._parsed = constraint, None
        self._tokenizer = model.tokenizer
        self._silent = False  # whether it is for programs alone, such as calls of tools
        self._decoding = Decoding(
            options, [*session.ids.tolist(), *prompt], model.stop_ids,
            vocabulary=model.tokenizer.vocab_size, context_length=session.context_length,
            matcher=constraint.matcher(model.tokenizer, model.stop_ids) if constraint else None,
        )  # fmt: skip
        self._generator = self._pieces(model, session, prompt)

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._generator)

    def run(self) -> GenerationResult:
        """Generates what is left of it; the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stops generation; what came so far stays in `result`."""
        self._generator.close()

    @property
    def cancelled(self) -> threading.Event:
        """Set it, from any thread, and the stream ends before its next token."""
        return self._decoding.cancelled

    @property
    def result(self) -> GenerationResult:
        decoding = self._decoding
        return GenerationResult(
            text="".join(self._text),
            tokens=tuple(decoding.tokens),
            finish_reason=decoding.finish_reason or "closed",
            prompt_tokens=self._prompt_tokens,
            seed=decoding.options.seed or 0,
            prefill_seconds=self._timing.prefill,
            decode_seconds=self._timing.decode,
            parsed=None if self._is_for_tools else self._parsed,
            calls=self._parsed or () if self._is_for_tools else (),
            forced_tokens=decoding.forced_tokens,
            reused_tokens=self._reused,
        )

    @property
    def _is_for_tools(self) -> bool:
        return self._constraint is not None and self._constraint.kind == "tools"

    def _pieces(self, model: Model, session: Session, prompt: Sequence[int]) -> Generator[str]:
        decoder, held, stops = model.tokenizer.stream(), "", self._decoding.options.stop
        lookup, asked = None, self._decoding.options.prompt_lookup
        if asked is None:
            asked = model.engine.guesses_pay and self._decoding.options.temperature == 0
        if asked:
            lookup = PromptLookup([*session.ids.tolist(), *prompt])
        constraint, first = self._constraint, True
        tokens = generate_tokens(session, prompt, self._decoding, self._timing, lookup)
        for token in tokens:
            if first and constraint is not None:
                self._silent = constraint.is_silent(model.tokenizer, token)
            first = False
            if self._silent:
                continue
            held += decoder.feed(token)
            end = _find_stop(held, stops)
            if end is not None:
                tokens.close()  # what was taken beyond it was never said
                self._decoding.stop_early()
                held = held[:end]
                break
            safe = len(held) - _possible_stop(held, stops)
            if safe:
                piece, held = held[:safe], held[safe:]
                self._text.append(piece)
                yield piece
        else:
            held += decoder.finish()
        if held:
            self._text.append(held)
            yield held
        if self._constraint is not None:
            self._parsed = self._read(self._constraint)

    def _read(self, constraint: Constraint) -> Any:
        """What the whole text means. Raises ConstraintError where it is not whole."""
        decoding = self._decoding
        text = self._tokenizer.decode(decoding.tokens)
        if decoding.finish_reason == "cancelled":
            return None
        whole = decoding.matcher is not None and decoding.matcher.accepting
        if decoding.finish_reason == "length" and not whole:
            raise ConstraintError(
                f"the text ended after {len(decoding.tokens)} tokens, before it was what "
                f"{constraint.kind} asks for (so far: {text[-60:]!r}); raise max_tokens"
                + ("" if len(decoding.tokens) == decoding.options.max_tokens else
                   ", or context_length: the context is full"),
                self.result,
            )  # fmt: skip
        try:
            return constraint.parse(self._tokenizer, decoding.tokens)
        except ValueError as error:  # a type may ask for more than its schema says
            reason = "; ".join(str(error).splitlines()[:3])
            raise ConstraintError(
                f"the text {text!r} fits the schema, but not its type: {reason}", self.result
            ) from error


def _find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins."""
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return min(found) if found else None


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may yet turn out to begin a stop text."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
