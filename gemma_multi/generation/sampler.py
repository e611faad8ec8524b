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

_COLDEST = 1e-5  # below it, dividing by the temperature overflows; greedy is the limit anyway
_BLOCK = 256
_NUCLEUS = 1024  # tokens that nearly always hold all of top-p


def choose(logits: np.ndarray, seen: np.ndarray, options: GenerationOptions, position: int) -> int:
    """The next token of one row.

    `logits` is `f32[V]`, `seen` the ids read so far, `position` the index the token will have.
    """
    if options.temperature < _COLDEST:
        return int(_penalise(logits, seen, options.repetition_penalty).argmax())
    ids, log_probabilities = candidates(logits, seen, options)
    return int(ids[(log_probabilities + gumbel(np, options.seed or 0, position, ids)).argmax()])


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


def candidates(
    logits: np.ndarray, seen: np.ndarray, options: GenerationOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that survive penalty and filters, and their log-probabilities."""
    scores = _penalise(logits, seen, options.repetition_penalty)
    scores = scores / np.float32(options.temperature)
    if 0 < options.top_k < len(scores):
        ids = _best(scores, options.top_k)
        total = _logsumexp(scores[ids])
    else:
        ids, total = np.arange(len(scores)), _logsumexp(scores)
        if options.top_p < 1 and len(scores) > _NUCLEUS:
            best = _best(scores, _NUCLEUS)
            if np.exp(scores[best] - total).sum() >= options.top_p:
                ids = best  # the rest of the vocabulary cannot be in it
    kept = scores[ids] - total
    if options.top_p < 1:
        order = np.lexsort((ids, -kept))  # best first; of equals, the lower id
        ids, kept = ids[order], kept[order]
        probabilities = np.exp(kept)
        inside = np.cumsum(probabilities) - probabilities < options.top_p
        inside[0] = True  # whatever rounds away, the best token stays
        ids, kept = ids[inside], kept[inside]
    if options.min_p > 0:
        near = kept >= kept.max() + np.log(np.float32(options.min_p))
        ids, kept = ids[near], kept[near]
    return ids, kept - _logsumexp(kept)


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The ids of the `k` best scores, and of any that tie with the last of them.

    The k-th best of the maxima of blocks is no more than the k-th best score, so what lies below
    it is dropped in one pass; over 262,144 words this takes a tenth of a partition's time.
    """
    ids = np.arange(len(scores))
    blocks = len(scores) // _BLOCK
    if blocks >= k:
        maxima = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        ids = np.flatnonzero(scores >= np.partition(maxima, -k)[-k])
    left = scores[ids]
    return ids[left >= np.partition(left, -k)[-k]]


def _logsumexp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top, dtype=np.float32).sum(dtype=np.float64)))
