"""How far a model's answers are from another's, on text: divergence, perplexity, agreement.

A model's part in it is `Said`: its layers are done with before logits are compared, so that of
several models only the heads are there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma_multi.config import EMBEDDING
from gemma_multi.decoder import Decoder, log_softmax
from gemma_multi.transforms import Closeness

_POSITIONS = 64  # whose logits are there at once


@dataclass(frozen=True)
class Said:
    """What a model says on some texts, at every position that has a next token."""

    states: list[np.ndarray]  # f32[T - 1, D] of each text, as they go into the head
    head: np.ndarray  # f32[V, D]

    @classmethod
    def by(cls, decoder: Decoder, texts: Sequence[np.ndarray], pool: Executor) -> Said:
        """`texts` are `i32[T]`."""
        states = list(pool.map(lambda ids: hidden_states(decoder, ids[:-1]), texts))
        return cls(list(map(decoder.rounded, states)), decoder.weights[EMBEDDING])


def measure(
    reference: Said, others: Sequence[Said], texts: Sequence[np.ndarray], pool: Executor
) -> tuple[float, list[Closeness]]:
    """(the reference's perplexity, how close each of the others comes), on the texts that all of
    them were given."""
    models = [reference, *others]
    compare = partial(_of_text, [model.head for model in models])
    of_texts = list(pool.map(compare, texts, *(model.states for model in models)))
    means = np.sum(of_texts, axis=0) / sum(len(ids) - 1 for ids in texts)
    closeness = [
        Closeness(float(divergence), float(np.exp(loss)), float(agreement))
        for loss, divergence, agreement in means[1:]
    ]
    return float(np.exp(means[0, 0])), closeness


def hidden_states(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """What the head is given: `i32[T]` -> `f32[T, D]`."""
    x = decoder.embed(ids)
    for layer in range(decoder.config.num_hidden_layers):
        x = decoder.layer(layer, x)
    return decoder.last_norm(x)


def _of_text(heads: Sequence[np.ndarray], ids: np.ndarray, *states: np.ndarray) -> np.ndarray:
    """Summed over a text, for each model: the negative logarithm of what came, the first's
    divergence from it, positions at which it agrees with the first. `f64[N, 3]`."""
    found = np.zeros((len(heads), 3))
    for start in range(0, len(ids) - 1, _POSITIONS):
        part = slice(start, start + _POSITIONS)
        came = ids[1:][part]
        rows = np.arange(len(came))
        own = log_softmax(states[0][part] @ heads[0].T)
        best, p = own.argmax(-1), np.exp(own)
        found[0, 0] -= own[rows, came].sum(dtype=np.float64)
        for sums, head, x in zip(found[1:], heads[1:], states[1:], strict=True):
            other = log_softmax(x[part] @ head.T)
            sums[0] -= other[rows, came].sum(dtype=np.float64)
            sums[2] += np.count_nonzero(other.argmax(-1) == best)
            other -= own
            sums[1] -= np.einsum("tv,tv->", p, other, dtype=np.float64)
    return found
