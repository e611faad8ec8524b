"""Decoding: one answer in the making, apart from who computes its logits.

It holds what choosing a token depends on (the options, the tokens seen, the position, a constraint)
and what ends an answer (stop tokens, the most tokens, a full context, a cancel flag). A driver asks
it which tokens follow without a choice (`forced`), which logits it wants (`want`), and with those,
wherever it got them, for the next token; one driver may step many. Where an engine can choose
several tokens ahead, by the same options, that is what is wanted, and they are taken by `force`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable

import numpy as np

from gemma_multi.constraints import Matcher
from gemma_multi.engines import LAST, Chosen, Rows, Wanted
from gemma_multi.errors import OptionError
from gemma_multi.generation.result import FinishReason, TokenLogprobs
from gemma_multi.sampling import COLDEST, GenerationOptions, choose, lead
from gemma_multi.sampling.on_device import can_choose

# Where a constraint leaves fewer tokens than this, only their rows of the head are computed.
_FEW = 4096


class Decoding:
    """The state of one answer."""

    def __init__(
        self, options: GenerationOptions, context: Iterable[int], stop_ids: Collection[int], *,
        vocabulary: int | None = None, context_length: int | None = None,
        cancelled: threading.Event | None = None, matcher: Matcher | None = None, ahead: int = 1,
        tie: float = 0.0,
    ) -> None:  # fmt: skip
        """`context` is all that will have been read before the first token. Ids from `vocabulary`
        on are never chosen: some models pad their embedding past what their tokenizer knows.
        `cancelled` may be set by another thread, and ends the answer before its next token.
        `matcher` follows the constraint that the answer must fit. `ahead` is how many tokens the
        engine may choose at once, after the first. Logits closer than `tie` are noted once tokens
        have been read several at a time, see `near_ties`."""
        self.options = options
        self.tokens: list[int] = []  # what was chosen or forced, without the stop token
        self.finish_reason: FinishReason | None = None  # None: it goes on
        self.cancelled = cancelled or threading.Event()
        self.matcher = matcher
        # of each of `tokens`, if they are asked for; they are read off the logits
        self.logprobs: list[TokenLogprobs] = []
        plain = matcher is None and can_choose(options) and options.logprobs is None
        self.ahead = ahead if plain else 1
        self.forced_tokens = 0  # of `tokens`, by the constraint
        self.guessed_tokens = 0  # of them, read several at a time as somebody guessed
        # where in `tokens` another was nearly as likely, after a guess was read: there, with its
        # sums in another order, a plain greedy answer may part from this one
        self.near_ties: list[int] = []
        self._tie, self._has_guessed = tie, False
        self._want: Wanted | None = None  # of the next token, once somebody asked
        self._stop_ids, self._vocabulary = stop_ids, vocabulary
        self._context_length = context_length
        given = np.fromiter(context, np.int64)
        self.position = len(given)  # the index that the next token will have
        self._seen = _Seen(given) if options.repetition_penalty != 1 else None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def want(self) -> Wanted:
        """The logits that `next` will look at, all, or of the few tokens that may come; or some
        tokens ahead, for `force`. The first is not waited for together with others."""
        if self._want is None:
            self._want = LAST
            # to the end, though the last may be few: a plain step is another program to compile
            count = min(self.ahead, self._room) if self.ahead > 1 and self.tokens else 0
            if count > 0:
                self._want = Chosen(self.options, count, self._vocabulary)
            elif self.matcher is not None and not self.finished:
                allowed = self._allowed()
                if np.count_nonzero(allowed) < _FEW:
                    self._want = Rows(np.flatnonzero(allowed))
        return self._want

    def next(self, logits: np.ndarray, after_guess: bool = False) -> int | None:
        """Chooses, takes the token and returns it; None where the answer ends instead. `logits`
        are of those in `want`, `f32[N]`, or `f32[V]` where that is all tokens, or they were read
        together with the others `after_guess`."""
        if self.finished or self._cancelled():
            return None
        ids = None
        if isinstance(self.want, Rows):
            ids = self.want.ids
            logits = logits[ids] if after_guess else logits
        else:
            logits = logits[: self._vocabulary]
            if self.matcher is not None:
                logits = np.where(self._allowed()[: len(logits)], logits, -np.inf)
        seen = self._seen.ids if self._seen else _NOTHING
        token = choose(logits, seen, self.options, self.position, ids)
        self._has_guessed |= after_guess
        watched = self._has_guessed and self._tie > 0 and self.options.temperature < COLDEST
        if watched and lead(logits, seen, self.options, ids) < self._tie:
            self.near_ties.append(len(self.tokens))
        if not self._take(token):
            return None
        if self.options.logprobs is not None:
            self.logprobs.append(TokenLogprobs.of(token, logits, self.options.logprobs))
        return token

    def forced(self) -> list[int]:
        """Takes and returns the tokens that the constraint leaves no choice about."""
        taken: list[int] = []
        while self.matcher is not None and not self.finished:
            tokens = self.matcher.forced()
            if not tokens:
                break
            taken += self.force(tokens)
        self.forced_tokens += len(taken)
        return taken

    def force(self, tokens: Iterable[int]) -> list[int]:
        """Takes tokens that follow without a choice; the part of them that was taken."""
        taken = []
        for token in tokens:
            if self.finished or self._cancelled() or not self._take(token):
                break
            taken.append(token)
        return taken

    def finish(self, reason: FinishReason) -> None:
        """Ends the answer from outside."""
        self.finish_reason = self.finish_reason or reason

    def cut(self, count: int, reason: FinishReason) -> None:
        """Ends the answer after its first `count` tokens, though more were taken."""
        del self.tokens[count:], self.logprobs[count:]
        self.near_ties = [at for at in self.near_ties if at < count]
        self.guessed_tokens = min(self.guessed_tokens, count)
        self.finish_reason = reason

    @property
    def _room(self) -> int:
        """Tokens that may yet be taken."""
        left = self.options.max_tokens - len(self.tokens)
        if self._context_length is not None:
            left = min(left, self._context_length + 1 - self.position)
        return left

    def _take(self, token: int) -> bool:
        """Adds a token unless it ends the answer, and sees whether it was the last."""
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return False
        self.tokens.append(token)
        self.position += 1
        self._want = None
        if self.matcher is not None:
            self.matcher.take(token)
        if self._seen:
            self._seen.add(token)
        # a token at the very end of the context is given, and never read
        full = self._context_length is not None and self.position > self._context_length
        if self.matcher is not None and self.matcher.finished:
            self.finish_reason = "stop"  # whole, even if it was the last token there was room for
        elif len(self.tokens) == self.options.max_tokens or full:
            self.finish_reason = "length"
        return True

    def _allowed(self) -> np.ndarray:
        assert self.matcher is not None
        allowed = self.matcher.allowed()[: self._vocabulary]
        if not allowed.any():
            raise OptionError(f"{self.matcher.constraint.kind} allows no token at all here")
        return allowed

    def _cancelled(self) -> bool:
        if self.cancelled.is_set():
            self.finish("cancelled")
        return self.finished


_NOTHING = np.zeros(0, np.int64)


class _Seen:
    """Each id once, in an array that grows."""

    def __init__(self, ids: np.ndarray) -> None:
        self._known = set(ids.tolist())
        self._ids = np.fromiter(self._known, np.int64)
        self._count = len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._count]

    def add(self, token: int) -> None:
        if token in self._known:
            return
        self._known.add(token)
        if self._count == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros(max(64, self._count), np.int64)])
        self._ids[self._count] = token
        self._count += 1
