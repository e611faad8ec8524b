"""What is run: a prompt and a stretch of decoding for speed, 25 conversations for what use costs.

Google says of Gemma 3 270M in int4 that 25 conversations took 0.75% of a Pixel 9 Pro's battery, and
not how long they were. So that figures of two machines, backends or years mean the same, here they
are fixed, and as long as people's are: LMSYS-Chat-1M, a million of them (arXiv 2309.11998, table
1), has 2.0 turns in a conversation, 69.5 tokens in a prompt and 214.5 in an answer on average.

- 25 conversations, as published.
- 1, 1, 2, 2 or 4 turns, again and again: 2 on average, 50 in all; half of them go on in a context
  that was read before.
- A turn reads 15, 35, 60, 90 or 150 tokens: 70 on average, from a question in a line to a page's
  paragraph. 3,500 in all.
- It writes 45, 120, 200, 290 or 420: 215 on average. 10,750 in all. Answers are three times as long
  as prompts, as people's are, so that decoding is what counts.
- Of those lengths each pair comes twice, and each at every place of a conversation.
- The longest conversation has 1,365 tokens, which a context of 2,048 holds.

What is read are ids drawn with a seed, and answers are drawn with one and do not stop early: the
work is the same for each model, precision and engine, whatever they would say. Tokens are chosen
as `generate` does by default; a session is kept from turn to turn, as a chat keeps it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# tokens read at once, as in llama-bench's pp512, and written one by one behind them
PROMPT, STEPS = 512, 64
QUESTION, QUESTIONS = 32, 9  # tokens of a question in a line, and how often its answer is begun
COUNT = 25
_TURNS = (1, 1, 2, 2, 4)
_READ = (15, 35, 60, 90, 150)
_WRITE = (45, 120, 200, 290, 420)


@dataclass(frozen=True)
class Turn:
    """Tokens of it."""

    read: int
    write: int


WARM_UP = tuple(Turn(read, 2) for read in _READ)  # what may be compiled for each length


def conversations(count: int = COUNT) -> list[tuple[Turn, ...]]:
    """The first of them; after the 25th they come again."""
    turns, found = _endless_turns(), []
    for i in range(count):
        found.append(tuple(next(turns) for _ in range(_TURNS[i % len(_TURNS)])))
    return found


def _endless_turns() -> Iterator[Turn]:
    for k in itertools.count():
        shift = k // sum(_TURNS)  # else a place would always have the same lengths
        yield Turn(_READ[(k + shift) % len(_READ)], _WRITE[(2 * k + shift) % len(_WRITE)])


def drawn_ids(seed: int, count: int, vocabulary: int) -> list[int]:
    """From the upper half of the vocabulary, where no id steers a conversation."""
    return np.random.default_rng(seed).integers(vocabulary // 2, vocabulary, count).tolist()
