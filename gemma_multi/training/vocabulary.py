"""The words over which recovery compares two models, where there are too many to compare them all.

Two thirds of a step would go into the logits of 262,144 words, nearly all of them impossible at
nearly all positions. Here words are put in the order in which the teacher finds them likely on the
rows. The first are compared one by one; the others in stretches, longer and longer, of which one
word counts for all. The sum over the vocabulary stays what it was, near enough. Validation takes
all words.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from gemma_multi.calibration.measure import hidden_states
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.decoder import Decoder, Weights, softmax
from gemma_multi.machine import available_cores
from gemma_multi.training.examples import Examples

_LIKELY, _STRETCHES = 8_192, 8_192
_SAMPLE = 4_096  # tokens of the rows, on which the teacher is asked


class Vocabulary(NamedTuple):
    """Some words in place of all."""

    ids: Any  # i32[N]
    log_weights: Any  # f32[N], the logarithm of the number of words that each stands for


def compared(
    words: Vocabulary | None, embedding: Any, teacher: tuple[Any, Any] | None
) -> tuple[Any, tuple[Any, Any] | None, Any]:
    """(embedding, teacher's (hidden, embedding), log weights) over `words` where there are a
    teacher and words, in any framework's arrays; else over all, and no weights."""
    if words is None or teacher is None:
        return embedding, teacher, None
    hidden, theirs = teacher
    return embedding[words.ids], (hidden, theirs[words.ids]), words.log_weights


def likely_words(
    teacher: Checkpoint, rows: Examples, progress: Callable[[int], None] | None = None
) -> Vocabulary | None:
    """Those of a teacher on some of the rows; None where all words are few enough. `progress` is
    told how many tokens were read."""
    size = teacher.config.vocab_size
    if size <= 2 * (_LIKELY + _STRETCHES):
        return None
    texts, tokens = [], 0
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(rows)):
        if tokens >= _SAMPLE:
            break
        texts.append(rows.example(i)[0][: _SAMPLE // 4])
        tokens += len(texts[-1])
    decoder = Decoder(teacher.config, Weights(teacher))
    with ThreadPoolExecutor(available_cores()) as pool, threadpool_limits(1):
        mass, read = np.zeros(size), 0
        for ids, of_text in zip(texts, pool.map(partial(_mass, decoder), texts), strict=True):
            mass += of_text
            read += len(ids)
            if progress:
                progress(read)
    order = np.argsort(-mass, kind="stable")
    edges = np.geomspace(_LIKELY, size, _STRETCHES + 1).astype(int)
    standing = rng.integers(edges[:-1], edges[1:])
    ids = np.concatenate([order[:_LIKELY], order[standing]])
    counts = np.concatenate([np.ones(_LIKELY), np.diff(edges)])
    return Vocabulary(ids.astype(np.int32), np.log(counts).astype(np.float32))


def _mass(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """How much of the teacher's probability each word has, summed over a text: `f64[V]`."""
    total = np.zeros(decoder.config.vocab_size)
    for _, logits in decoder.head(hidden_states(decoder, ids)):
        total += softmax(logits).sum(0, dtype=np.float64)
    return total
