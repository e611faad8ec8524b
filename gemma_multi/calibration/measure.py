"""How far a model's answers are from another's, on text: divergence, perplexity, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np

from gemma_multi.calibration.decoder import Decoder
from gemma_multi.transforms import Closeness


def measure(
    reference: Decoder, others: Sequence[Decoder], texts: Sequence[np.ndarray], pool: Executor
) -> tuple[float, list[Closeness]]:
    """(the reference's perplexity, how close each of `others` comes), over every position that has
    a next token."""
    sums = sum(pool.map(lambda ids: _of_text(reference, others, ids), texts))
    tokens = sum(len(ids) - 1 for ids in texts)
    means = np.asarray(sums) / tokens  # f64[1 + others, (nll, divergence, agreement)]
    perplexity = np.exp(means[:, 0])
    return float(perplexity[0]), [
        Closeness(float(row[1]), float(own), float(row[2]))
        for row, own in zip(means[1:], perplexity[1:], strict=True)
    ]


def hidden_states(decoder: Decoder, ids: np.ndarray) -> np.ndarray:
    """What the head is given: `i32[T]` -> `f32[T, D]`."""
    x = decoder.embed(ids)
    for layer in range(decoder.config.num_hidden_layers):
        x = decoder.layer(layer, x)
    return decoder.last_norm(x)


def _of_text(reference: Decoder, others: Sequence[Decoder], ids: np.ndarray) -> np.ndarray:
    """Sums over a text: `f64[1 + others, 3]`."""
    models = [reference, *others]
    heads = [model.head(hidden_states(model, ids[:-1])) for model in models]
    found = np.zeros((len(models), 3))
    for blocks in zip(*heads, strict=True):
        part = blocks[0][0]
        target = ids[1:][part]
        log_p = None
        for i, (_, logits) in enumerate(blocks):
            log_q = _log_softmax(logits)
            found[i, 0] -= log_q[np.arange(len(target)), target].sum(dtype=np.float64)
            if log_p is None:
                log_p, p, best = log_q, np.exp(log_q), log_q.argmax(-1)
                entropy = np.einsum("tv,tv->", p, log_p, dtype=np.float64)
                continue
            found[i, 1] += entropy - np.einsum("tv,tv->", p, log_q, dtype=np.float64)
            found[i, 2] += np.count_nonzero(log_q.argmax(-1) == best)
    return found


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in place."""
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits
