"""How far a model's answers are from another's, on text: divergence, perplexity, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import repeat

import numpy as np

from gemma_multi.decoder import Decoder, log_softmax
from gemma_multi.transforms import Closeness


def measure(
    reference: Decoder, other: Decoder, texts: Sequence[np.ndarray], pool: Executor,
    known: Sequence[np.ndarray] | None = None,
) -> tuple[float, Closeness]:  # fmt: skip
    """(the reference's perplexity, how close the other comes), over every position that has a
    next token. `known` are the reference's `hidden_states` of the texts, without their last
    tokens, where they have been computed before."""
    hidden = known or repeat(None)
    sums = sum(pool.map(partial(_of_text, reference, other), texts, hidden))
    tokens = sum(len(ids) - 1 for ids in texts)
    own, theirs, divergence, agreement = np.asarray(sums) / tokens
    closeness = Closeness(float(divergence), float(np.exp(theirs)), float(agreement))
    return float(np.exp(own)), closeness


def hidden_states(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """What the head is given: `i32[T]` -> `f32[T, D]`."""
    x = decoder.embed(ids)
    for layer in range(decoder.config.num_hidden_layers):
        x = decoder.layer(layer, x)
    return decoder.last_norm(x)


def _of_text(
    reference: Decoder, other: Decoder, ids: np.ndarray, known: np.ndarray | None
) -> np.ndarray:
    """Summed over a text: the negative logarithms of what came, by each of the two; divergence;
    positions at which they agree."""
    if known is None:
        known = hidden_states(reference, ids[:-1])
    found = np.zeros(4)
    heads = reference.head(known), other.head(hidden_states(other, ids[:-1]))
    for (part, p), (_, q) in zip(*heads, strict=True):
        came = ids[1:][part]
        rows = np.arange(len(came))
        log_p, log_q = log_softmax(p), log_softmax(q)
        found[0] -= log_p[rows, came].sum(dtype=np.float64)
        found[1] -= log_q[rows, came].sum(dtype=np.float64)
        found[3] += np.count_nonzero(log_p.argmax(-1) == log_q.argmax(-1))
        log_q -= log_p
        found[2] -= np.einsum("tv,tv->", np.exp(log_p), log_q, dtype=np.float64)
    return found
