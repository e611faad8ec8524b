"""The generation loop: read the prompt, choose a token, read it, until something says stop."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from gemma_multi.engines.base import Session
from gemma_multi.generation.options import GenerationOptions
from gemma_multi.generation.result import FinishReason
from gemma_multi.generation.sampler import choose


@dataclass
class Progress:
    """Filled in by the loop as it runs."""

    finish_reason: FinishReason = "closed"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def generate_tokens(
    session: Session,
    prompt: Sequence[int],
    options: GenerationOptions,
    stop_ids: Collection[int],
    progress: Progress | None = None,
    vocabulary: int | None = None,
) -> Generator[int]:
    """Yields token ids as they are chosen; a stop token ends the loop and is not yielded.

    `prompt` is what the session has not read yet. Ids from `vocabulary` on are never chosen: some
    models pad their embedding past what their tokenizer knows. The last token yielded has not
    been read by the session: nobody may need what comes after it.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    logits = session.prefill(prompt)[0]
    progress.prefill_seconds = time.perf_counter() - started
    decoding = 0.0
    for count in range(1, options.max_tokens + 1):
        started = time.perf_counter()
        token = choose(logits[:vocabulary], session.ids[0], options, session.length)
        decoding += time.perf_counter() - started
        progress.decode_seconds = decoding
        if token in stop_ids:
            progress.finish_reason = "stop"
            return
        yield token  # the caller's time is not ours
        if count == options.max_tokens or session.length == session.context_length:
            progress.finish_reason = "length"
            return
        started = time.perf_counter()
        logits = session.step(token)[0]
        decoding += time.perf_counter() - started
