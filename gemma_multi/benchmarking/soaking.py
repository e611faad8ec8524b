"""Conversations for as long as asked, and what memory the process holds after each turn.

    python -m gemma_multi.benchmarking.soaking < job.json

A turn is what a user's is: `Chat.send`, with template, tokenizer, sampler and prefix cache. Lengths
are those of `workload`; an answer may end before. Each turn is told as it ends, so that a run that
is ended, or ends itself, has shown what it could.
"""

from __future__ import annotations

import time
from typing import Any

from gemma_multi import own_process
from gemma_multi.benchmarking.measuring import Tell
from gemma_multi.benchmarking.places import loaded
from gemma_multi.benchmarking.workload import conversations, drawn_ids
from gemma_multi.errors import BackendError, ContextError
from gemma_multi.machine import memory_in_use


def soak(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Tells (seconds, conversation, turn, bytes) after each turn."""
    model = loaded(job)
    if memory_in_use() is None:
        raise BackendError("this system does not say what memory a process holds")
    vocabulary, work = model.tokenizer.vocab_size, conversations()
    tell(place=model.describe())
    start, turns, ended = time.perf_counter(), 0, 0
    while True:
        chat = model.chat()
        for turn in work[ended % len(work)]:
            text = model.tokenizer.decode(drawn_ids(turns, turn.read, vocabulary))
            try:
                chat.send(text, max_tokens=turn.write, seed=turns)
            except ContextError:
                if not chat.messages:
                    raise
                break  # a context that is full; the next conversation begins
            turns += 1
            seconds = time.perf_counter() - start
            tell(sample=(round(seconds, 3), ended, turns, memory_in_use()))
            if seconds > 60 * job["minutes"]:
                return {}
        ended += 1


if __name__ == "__main__":
    own_process.answer(soak)
