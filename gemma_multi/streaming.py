"""TextStream: tokens become text as they are generated, and stop texts end it.

What may yet turn out to begin a stop text is held back until it is decided, and a character that
spans tokens comes out whole. A constrained text that ends whole becomes a value as well, and one
that does not is an error.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_multi.constraints import Constraint
from gemma_multi.engines import NOTHING, Session
from gemma_multi.errors import BackendError, ConstraintError, OptionError
from gemma_multi.generation import (
    Decoding,
    FinishReason,
    GenerationResult,
    PromptLookup,
    TokenLogprobs,
    answer,
)
from gemma_multi.reads import Read, Reads, next_read
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
        if constraint is not None and options.logprobs is not None:
            raise OptionError(
                f"logprobs cannot be had where {constraint.kind} decides about tokens: those that "
                "follow without a choice have none; give one of the two"
            )
        self._prompt_tokens, self._reused = len(prompt) + session.length, reused
        self._prefill = self._decode = 0.0  # seconds
        self._constraint, self._parsed = constraint, None
        self._session, self._prefixes = session, model.prefixes
        self._tokenizer = model.tokenizer
        self._decoding = Decoding(
            options, [*session.ids.tolist(), *prompt], model.stop_ids,
            vocabulary=model.tokenizer.vocab_size, context_length=session.context_length,
            matcher=constraint.matcher(model.tokenizer, model.stop_ids) if constraint else None,
            ahead=model.engine.steps_ahead, tie=model.engine.tie,
        )  # fmt: skip
        self._text: list[str] = []  # what was said
        self._tokens_said = 0  # tokens up to there
        self._pieces: deque[tuple[str, int]] = deque()  # to be said, and the tokens up to there
        self._tokens_heard, self._held = 0, ""  # tokens so far, and text that is held back
        self._silent = False  # whether it is for programs alone, such as calls of tools
        self._detokenizer = model.tokenizer.stream()
        lookup, asked = None, options.prompt_lookup
        if asked is None:
            asked = model.engine.guesses_pay and options.temperature == 0
        if asked:
            lookup = PromptLookup([*session.ids.tolist(), *prompt])
        # None once it is generated, which is before it is ended: all is said then, and parsed
        self._reads: Reads[None] | None = answer(
            session, prompt, self._decoding, _weakly(self._hear), lookup
        )
        self._read: Read | None = None  # the next one
        self._prompt_is_read = self._ended = False

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        # several tokens came at once, and these are what nobody has heard of them
        if self._pieces and self._decoding.cancelled.is_set():
            self._cut("cancelled")
        while not self._pieces and self._reads is not None:
            started = time.perf_counter()
            try:
                read = self._read
                self._go_on(read and read.session.read(read.ids, read.want), started)
            except BaseException:
                self._reads, self._ended = None, True
                raise
        if self._pieces:
            return self._say()
        self._end()
        raise StopIteration

    def whole(self, heard: Callable[[str, int], None] | None = None) -> Reads[GenerationResult]:
        """The reads of all of it, and its result: for a driver of many. `heard` is told each piece
        as it comes, and how many tokens have come up to there."""
        while self._reads is not None:
            started = time.perf_counter()
            self._go_on((yield self._read) if self._read else None, started)
            while self._pieces:
                piece = self._say()
                if heard is not None:
                    heard(piece, self._tokens_said)
        self._end()
        return self.result

    def run(self) -> GenerationResult:
        """Generates what is left of it; the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stops generation; what came so far stays in `result`."""
        if self._pieces:
            self._cut("closed")
        elif self._reads is not None:
            self._reads.close()
        self._pieces.clear()
        self._reads, self._ended = None, True

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
            prefill_seconds=self._prefill,
            decode_seconds=self._decode,
            parsed=None if self._is_for_tools else self._parsed,
            calls=self._parsed or () if self._is_for_tools else (),
            forced_tokens=decoding.forced_tokens,
            reused_tokens=self._reused,
            guessed_tokens=decoding.guessed_tokens,
            near_ties=tuple(decoding.near_ties),
            logprobs=tuple(decoding.logprobs),
        )

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """Those of the tokens so far, if they were asked for."""
        return self._decoding.logprobs

    @property
    def _is_for_tools(self) -> bool:
        return self._constraint is not None and self._constraint.kind == "tools"

    def _go_on(self, result: Any, started: float) -> None:
        """With what came of the last read, to the next."""
        assert self._reads is not None
        of_prompt = not self._prompt_is_read
        if self._read is not None and self._read.want is not NOTHING:
            self._prompt_is_read = True
        try:
            self._read = next_read(self._reads, result)
        except BackendError:  # what is not finite may be in the caches that others go on from
            self._prefixes.clear()
            self._session.truncate(0)
            raise
        if self._read is None:
            self._reads = None
            self._put(self._held + self._detokenizer.finish())
        elapsed = time.perf_counter() - started
        if of_prompt:
            self._prefill += elapsed
        else:
            self._decode += elapsed

    def _hear(self, tokens: Sequence[int]) -> None:
        """Tokens that were taken become text, as far as it is decided."""
        for token in tokens:
            self._tokens_heard += 1
            if self._tokens_heard == 1 and self._constraint is not None:
                self._silent = self._constraint.is_silent(self._tokenizer, token)
            if self._silent:
                self._tokens_said = self._tokens_heard
                continue
            self._held += self._detokenizer.feed(token)
            stops = self._decoding.options.stop
            end = _find_stop(self._held, stops)
            if end is not None:
                # what was taken beyond it is not said
                self._decoding.cut(self._tokens_heard, "stop")
                self._put(self._held[:end])
                self._detokenizer, self._held = self._tokenizer.stream(), ""
                return
            safe = len(self._held) - _possible_stop(self._held, stops)
            piece, self._held = self._held[:safe], self._held[safe:]
            self._put(piece)

    def _put(self, piece: str) -> None:
        if piece:
            self._pieces.append((piece, self._tokens_heard))

    def _say(self) -> str:
        piece, self._tokens_said = self._pieces.popleft()
        self._text.append(piece)
        return piece

    def _cut(self, reason: FinishReason) -> None:
        """Ends it at what was said."""
        if self._tokens_said < len(self._decoding.tokens):
            self._pieces.clear()
            self._decoding.cut(self._tokens_said, reason)
            self._reads, self._held = None, ""

    def _end(self) -> None:
        if not self._ended and self._constraint is not None:
            self._ended = True
            self._parsed = self._parse(self._constraint)
        self._ended = True

    def _parse(self, constraint: Constraint) -> Any:
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
        except Exception as error:  # a type may ask for more than its schema says, in its own words
            reason = "; ".join(str(error).splitlines()[:3])
            raise ConstraintError(
                f"the text {text!r} fits the schema, but not its type: {reason}", self.result
            ) from error


def _weakly(method: Callable[[Sequence[int]], None]) -> Callable[[Sequence[int]], None]:
    """A stream holds its reads; if those held the stream, nobody would let go of its session."""
    held = weakref.WeakMethod(method)

    def call(tokens: Sequence[int]) -> None:
        hear = held()
        if hear is not None:
            hear(tokens)

    return call


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
