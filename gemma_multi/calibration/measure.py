"""How far a model's answers are from another's, on text: divergence, perplexity, agreement.

Of 262,144 words at a thousand positions, logits are a gigabyte a model. So the vocabulary comes in
parts, of all models at once, and each part gives sums to which the others' are added. A model's
layers are done with before that: what is compared is `Said`, its states and its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import numpy as np

from gemma_multi.config import EMBEDDING
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.machine import available_cores
from gemma_multi.transforms import Closeness

_POSITIONS = 2048  # whose logits are there at once, shared among threads: 33 MB of each model
_WORDS = 4096


@dataclass(frozen=True)
class Said:
    """What a model says on some texts, at every position that has a next token."""

    states: np.ndarray  # f32[N, D] of all positions, as they go into the head
    weights: Weights  # the embedding's, which is the head
    words: int

    @classmethod
    def by(cls, decoder: Decoder, texts: Sequence[np.ndarray], pool: Executor) -> Said:
        """`texts` are `i32[T]`."""
        states = pool.map(lambda ids: hidden_states(decoder, ids[:-1]), texts)
        return cls(
            np.concatenate(list(map(decoder.rounded, states))),
            decoder.weights.alone(EMBEDDING), decoder.config.vocab_size,
        )  # fmt: skip


def hidden_states(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """What the head is given: `i32[T]` -> `f32[T, D]`."""
    x = decoder.embed(ids)
    for layer in range(decoder.config.num_hidden_layers):
        x = decoder.layer(layer, x)
    return decoder.last_norm(x)


def measure(
    reference: Said, others: Sequence[Said], texts: Sequence[np.ndarray], pool: Executor
) -> tuple[float, list[Closeness]]:
    """(the reference's perplexity, how close each of the others comes), on the texts that all of
    them were given."""
    models = [reference, *others]
    came = np.concatenate([ids[1:] for ids in texts])
    sums = np.zeros((len(models), 3))
    size = max(1, _POSITIONS // available_cores())
    for start in range(0, len(came), size):
        positions = slice(start, start + size)
        of_words = partial(_of_words, models, positions, came[positions])
        parts = pool.map(of_words, range(0, reference.words, _WORDS))
        sums += _of_positions(np.stack(list(parts)))
    means = sums / len(came)
    closeness = [
        Closeness(float(divergence), float(np.exp(loss)), float(agreement))
        for loss, divergence, agreement in means[1:]
    ]
    return float(np.exp(means[0, 0])), closeness


def _of_words(models: Sequence[Said], positions: slice, came: np.ndarray, start: int) -> np.ndarray:
    """Over the words from `start` on, of each model at each of N positions: the greatest logit, the
    word that has it, the sum of `exp(logit - greatest)`, the logit of the word that came if it is
    one of these, and the sum of the reference's exponentials times how far its logits are above
    the model's. `f64[M, 5, N]`."""
    words = slice(start, start + _WORDS)
    found = np.zeros((len(models), 5, len(came)))
    for model, (greatest, best, mass, of_came, apart) in zip(models, found, strict=True):
        logits = model.states[positions] @ model.weights.rows(EMBEDDING, words).T
        inside = np.flatnonzero((came >= start) & (came < start + logits.shape[1]))
        of_came[inside] = logits[inside, came[inside] - start]
        greatest[:] = top = logits.max(1)
        best[:] = start + logits.argmax(1)
        exponentials = np.exp(logits - top[:, None])
        mass[:] = exponentials.sum(1)
        if model is models[0]:
            own, weights = logits, exponentials
        else:
            np.subtract(own, logits, out=logits)
            apart[:] = np.einsum("nv,nv->n", weights, logits)
    return found


def _of_positions(parts: np.ndarray) -> np.ndarray:
    """What `_of_words` found in every part of the vocabulary, `f64[P, M, 5, N]`, to sums over the
    positions: the negative logarithm of what came, the divergence from the first model, positions
    at which it agrees with the first. `f64[M, 3]`."""
    greatest, best, mass, of_came, apart = np.moveaxis(parts, 2, 0)
    top = greatest.max(0)
    share = np.exp(greatest - top)  # f64[P, M, N]
    total = (mass * share).sum(0)
    logs = top + np.log(total)
    said = np.take_along_axis(best, greatest.argmax(0)[None], 0)[0]
    divergence = (apart * share[:, :1]).sum(0) / total[0] - (logs[0] - logs)
    agrees = said == said[0]
    return np.stack([(logs - of_came.sum(0)).sum(1), divergence.sum(1), agrees.sum(1)], axis=1)
