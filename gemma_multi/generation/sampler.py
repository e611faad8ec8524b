"""The sampler: logits to one token.

Design choices:
- Randomness is a hash of (seed, position, token id), not a generator's state. The same seed
  gives the same text on every engine, in any batch, and after any restart, as long as the logits
  agree to rounding.
- A token is drawn by adding Gumbel noise to its log-probability and taking the best, which is
  the same as drawing from the distribution.
- The filters come in the order of transformers: repetition penalty, temperature, top-k, top-p,
  min-p. The penalty and the filters need a handful of passes over 262,144 logits at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_multi.generation.options import GenerationOptions


def choose(
    logits: np.ndarray, seen: np.ndarray, options: GenerationOptions, position: int
) -> tuple[int, float]:
    """The next token of one row, and the log-probability the model gave it.

    `logits` is `f32[V]`, `seen` the ids read so far, `position` the index the token will have.
    """
    log_total = _logsumexp(logits)
    scores = _penalise(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        token = int(scores.argmax())
    else:
        ids, log_weights = _candidates(scores / np.float32(options.temperature), options)
        noise = gumbel(np, options.seed or 0, position, ids)
        token = int(ids[(log_weights + noise).argmax()])
    return token, float(logits[token]) - log_total


def gumbel(xp: Any, seed: int, position: int, ids: Any) -> Any:
    """Gumbel noise `f32[N]` for the tokens `ids`: integer arithmetic up to the last step."""
    state = xp.array(ids).astype(xp.uint32)
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, position & 0xFFFFFFFF):
        key = _scramble(np, np.array([(word + 0x9E3779B9) & 0xFFFFFFFF], np.uint32))
        state = _scramble(xp, state ^ xp.array(key))
    # 23 bits, moved to the middle of their step: never 0 or 1, and exact in float32
    uniform = ((state >> 9).astype(xp.float32) + 0.5) * 2.0**-23
    return -xp.log(-xp.log(uniform))


def _scramble(xp: Any, x: Any) -> Any:
    """A bijection of 32-bit words that changes every output bit with every input bit."""
    x = x ^ (x >> 16)
    x = x * xp.array(0x21F0AAAD, dtype=xp.uint32)
    x = x ^ (x >> 15)
    x = x * xp.array(0x735A2D97, dtype=xp.uint32)
    return x ^ (x >> 15)


def _penalise(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    if penalty == 1:
        return logits
    penalised = logits.copy()
    ids = np.unique(seen)
    values = penalised[ids]
    penalised[ids] = np.where(values > 0, values / penalty, values * penalty)
    return penalised


def _candidates(scores: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that survive the filters, best first, and their log-probabilities."""
    ids = np.arange(len(scores))
    if 0 < options.top_k < len(scores):
        threshold = np.partition(scores, -options.top_k)[-options.top_k]
        ids = np.flatnonzero(scores >= threshold)  # ties at the threshold all stay
    elif options.top_p < 1 or options.min_p > 0:
        # nothing e**-30 below the best token can matter to either filter
        ids = np.flatnonzero(scores >= scores.max() - 30)
    order = np.lexsort((ids, -scores[ids]))  # best first; of equals, the lower id
    ids = ids[order]
    kept = scores[ids]
    kept = kept - _logsumexp(kept)
    if options.top_p < 1:
        before = np.cumsum(np.exp(kept)) - np.exp(kept)
        ids, kept = ids[before < options.top_p], kept[before < options.top_p]
    if options.min_p > 0:
        near = kept >= kept[0] + np.log(np.float32(options.min_p))
        ids, kept = ids[near], kept[near]
    return ids, kept


def _logsumexp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top, dtype=np.float32).sum(dtype=np.float64)))
