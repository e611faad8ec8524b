"""The driver of one answer: read the prompt, ask the decoding for a token, read it, and again."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from gemma_multi.engines.base import ALL, NOTHING, Session
from gemma_multi.generation.decoding import Decoding
from gemma_multi.generation.lookup import PromptLookup
from gemma_multi.prefixes import shared_beginning

_PROMPT_CHUNK = 512  # tokens read between two looks at the cancel flag


@dataclass
class Timing:
    """Filled in by the loop as it runs, in seconds."""

    prefill: float = 0.0
    decode: float = 0.0


def generate_tokens(
    session: Session, prompt: Sequence[int], decoding: Decoding, timing: Timing | None = None,
    lookup: PromptLookup | None = None,
) -> Generator[int]:  # fmt: skip
    """Yields token ids as they are chosen, until `decoding` is finished.

    `prompt` is what the session has not read yet; `lookup`, if there is one, knows it and what was
    read before. The last token yielded has not been read by the session: nobody may need what comes
    after it.
    """
    timing = timing or Timing()
    started = time.perf_counter()
    session.check_room(prompt)  # before the first chunk, not in the middle
    *before, last = [prompt[i : i + _PROMPT_CHUNK] for i in range(0, len(prompt), _PROMPT_CHUNK)]
    for chunk in before:
        session.read(chunk, NOTHING)
        if decoding.cancelled.is_set():
            decoding.finish("cancelled")
            return
    timing.prefill = time.perf_counter() - started
    unread, first = list(last), True
    while True:
        started = time.perf_counter()
        forced = decoding.forced()
        unread += forced
        timing.decode += time.perf_counter() - started
        yield from _handed_out(forced, decoding)  # the caller's time is not ours
        if decoding.finished:
            return
        started = time.perf_counter()
        guess: list[int] = []
        if lookup is not None:
            lookup.add(forced)
            room = session.context_length - session.length - len(unread)
            guess = [] if first else lookup.guess()[: max(room, 0)]
        if guess:
            chosen = _with_guess(session, unread, guess, decoding)
        else:
            # what follows without a choice is read at once, with what came before it
            logits = session.read(unread, decoding.want)
            if first:
                timing.prefill += time.perf_counter() - started
                started, first = time.perf_counter(), False
            token = decoding.next(logits)
            chosen = [] if token is None else [token]
        right = shared_beginning(chosen, guess)
        if lookup is not None:
            lookup.add(chosen)
            if guess:
                lookup.judge(right)
        timing.decode += time.perf_counter() - started
        yield from _handed_out(chosen, decoding)
        if decoding.finished:
            return
        unread = chosen[right:]


def _handed_out(tokens: Sequence[int], decoding: Decoding) -> Generator[int]:
    """Yields tokens that were taken at once. Those that nobody waited for were never said."""
    said = len(decoding.tokens) - len(tokens)
    for i, token in enumerate(tokens):
        if i and decoding.cancelled.is_set():
            decoding.cut(said + i, "cancelled")
            return
        try:
            yield token
        except GeneratorExit:
            if i + 1 < len(tokens):
                decoding.cut(said + i + 1, "closed")
            raise


def _with_guess(
    session: Session, unread: list[int], guess: list[int], decoding: Decoding
) -> list[int]:
    """Reads what is unread, and a guess of what follows; the tokens that the decoding takes, up to
    the first that was not guessed. The session has then read those that were."""
    *before, last = unread
    if before:
        session.read(before, NOTHING)
    rows = session.read([last, *guess], ALL)
    chosen: list[int] = []
    while chosen == guess[: len(chosen)]:
        token = decoding.next(rows[len(chosen)], of_all=True)
        if token is None:
            break
        chosen += [token, *decoding.forced()]
        if decoding.finished:
            break
    session.truncate(session.length - len(guess) + shared_beginning(chosen, guess))
    return chosen
