"""The driver of one answer: read the prompt, ask the decoding for a token, read it, and again."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from gemma_multi.engines.base import NOTHING, Session
from gemma_multi.generation.decoding import Decoding

_PROMPT_CHUNK = 512  # tokens read between two looks at the cancel flag


@dataclass
class Timing:
    """Filled in by the loop as it runs, in seconds."""

    prefill: float = 0.0
    decode: float = 0.0


def generate_tokens(
    session: Session, prompt: Sequence[int], decoding: Decoding, timing: Timing | None = None
) -> Generator[int]:
    """Yields token ids as they are chosen, until `decoding` is finished.

    `prompt` is what the session has not read yet. The last token yielded has not been read by the
    session: nobody may need what comes after it.
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
    unread, first = last, True
    while True:
        started = time.perf_counter()
        forced = decoding.forced()
        timing.decode += time.perf_counter() - started
        yield from forced  # the caller's time is not ours
        if decoding.finished:
            return
        started = time.perf_counter()
        # what follows without a choice is read at once, with what came before it
        logits = session.read([*unread, *forced], decoding.want)
        if first:
            timing.prefill += time.perf_counter() - started
            started, first = time.perf_counter(), False
        token = decoding.next(logits)
        timing.decode += time.perf_counter() - started
        if token is None:
            return
        yield token
        if decoding.finished:
            return
        unread = [token]
