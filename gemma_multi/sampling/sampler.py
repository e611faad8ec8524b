"""The sampler: logits to one token.

Design choices:
- Randomness is a hash of (seed, position, token id), not a generator's state. The same seed
  gives the same text on every engine, in any batch, and after any restart, as long as the logits
  agree to rounding.
- A token is drawn by adding Gumbel noise to its log-probability and taking the best, which is
  the same as drawing from the distribution.
- Noise is bounded, so where nothing filters it is computed only for tokens that can still win.
- The filters come in the order of transformers: repetition penalty, temperature, top-k, top-p,
  min-p. The penalty and the filters need a handful of passes over 262,144 logits at most.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from gemma_multi.errors import BackendError
from gemma_multi.sampling.noise import (
    BITS,
    MOST_NOISE,
    as_noise,
    gumbel,
    noise_bits,
    position_key,
    seed_keys,
    seeded,
)
from gemma_multi.sampling.options import GenerationOptions

COLDEST = 1e-5  # below it, dividing by the temperature overflows; greedy is the limit anyway
_BLOCK = 256
_NUCLEUS = 1024  # tokens that nearly always hold all of top-p
_FIRST = 64  # tokens tried first when nothing filters
_NEAR = 4.0  # noise above this has one token in 55


def not_finite(what: str) -> BackendError:
    return BackendError(
        f"the {what} are not finite: the weights are damaged, or activations overflowed"
    )


def choose(
    logits: np.ndarray, seen: np.ndarray, options: GenerationOptions, position: int,
    ids: np.ndarray | None = None,
) -> int:  # fmt: skip
    """The next token of one row.

    `logits` is `f32[V]`, or `f32[N]` of the tokens `ids` (in ascending order) where no other may
    come; `seen` the ids read so far (each once is enough), `position` the index the token will
    have. Raises BackendError where no logit is finite, or one is not a number.
    """
    if not np.isfinite(logits.max()):
        raise not_finite("logits")
    seen = _places(seen, ids)
    if options.temperature < COLDEST:
        place = int(_penalise(logits, seen, options.repetition_penalty).argmax())
        return place if ids is None else int(ids[place])
    seed = options.seed or 0
    if options.top_k == 0 and options.top_p == 1 and options.min_p == 0:
        scores = _warmed(logits, seen, options)
        if ids is None:
            return _draw(scores, seed, position)
        return int(ids[(scores + gumbel(np, seed, position, ids)).argmax()])
    places, log_probabilities = candidates(logits, seen, options)
    kept = places if ids is None else ids[places]
    return int(kept[(log_probabilities + gumbel(np, seed, position, kept)).argmax()])


def lead(
    logits: np.ndarray, seen: np.ndarray, options: GenerationOptions,
    ids: np.ndarray | None = None,
) -> float:  # fmt: skip
    """How far the logit of the best token is above the next one's, with the penalty; infinite
    where no other may come. Arguments as of `choose`."""
    scores = _penalise(logits, _places(seen, ids), options.repetition_penalty)
    best = int(scores.argmax())
    others = np.concatenate([scores[:best], scores[best + 1 :]])
    return float(scores[best] - others.max()) if len(others) else math.inf


def _places(seen: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    """Where the tokens `seen` are in `ids`, which may be the whole vocabulary (None)."""
    return seen if ids is None or not len(seen) else np.flatnonzero(np.isin(ids, seen))


@lru_cache(maxsize=4)
def _seeded_vocabulary(seed: int, size: int) -> np.ndarray:
    """For all ids at once. One megabyte for 262,144 of them, and a text has one seed."""
    return np.asarray(seeded(np, seed_keys(seed), np.arange(size)))


def _draw(scores: np.ndarray, seed: int, position: int) -> int:
    """The token whose score and noise together are the most, of all.

    The best of a few likely tokens sets a bar. Below it by more than noise can be, a token has
    lost. Below it by `_NEAR`, it needs noise that few have, which its bits alone tell.
    """
    seeds, key = _seeded_vocabulary(seed, len(scores)), position_key(position)

    def best_of(ids: np.ndarray) -> tuple[int, float]:
        sums = scores[ids] + as_noise(np, noise_bits(np, seeds[ids], key))
        at = int(sums.argmax())
        return int(ids[at]), float(sums[at])

    first = _best(scores, min(_FIRST, len(scores)))
    _, bar = best_of(first)
    possible = scores >= np.float32(bar - MOST_NOISE)
    if np.count_nonzero(possible) > len(scores) // 8:
        rare = np.uint32(np.exp(-np.exp(-_NEAR)) * 2.0**BITS - 2)
        noisy = noise_bits(np, seeds, key) >= rare
        possible &= noisy | (scores >= np.float32(bar - _NEAR))
    return best_of(np.flatnonzero(possible))[0]


def _penalise(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    if penalty == 1 or not len(seen):
        return logits
    penalised = logits.copy()
    values = logits[seen]  # an id that is there twice is written twice, with the same value
    penalised[seen] = np.where(values > 0, values / penalty, values * penalty)
    return penalised


def _warmed(logits: np.ndarray, seen: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """Logits with the penalty, divided by the temperature."""
    scores = _penalise(logits, seen, options.repetition_penalty)
    return scores / np.float32(options.temperature) if options.temperature != 1 else scores


def candidates(
    logits: np.ndarray, seen: np.ndarray, options: GenerationOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that survive penalty and filters, and their log-probabilities."""
    scores = _warmed(logits, seen, options)
    if 0 < options.top_k < len(scores):
        ids = _best(scores, options.top_k)
        total = _logsumexp(scores[ids])
    else:
        ids, total = _nucleus(scores, options)
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


def _nucleus(scores: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, float]:
    """Tokens among which all that top-p or min-p keep must be, and the log of all weights' sum."""
    total = _logsumexp(scores)
    if options.top_p == 1 and options.min_p > 0:
        least = scores.max() + np.log(np.float32(options.min_p))
        return np.flatnonzero(scores >= least), total
    if options.top_p < 1 and len(scores) > _NUCLEUS:
        best = _best(scores, _NUCLEUS)
        if np.exp(scores[best] - total).sum() >= options.top_p:
            return best, total  # the rest of the vocabulary cannot be in it
    return np.arange(len(scores)), total


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The ids of the `k` best scores, and of any that tie with the last of them.

    The k-th best of the maxima of blocks is no more than the k-th best score, so what lies below
    it is dropped in one pass; over 262,144 tokens this takes a tenth of a partition's time.
    """
    blocks = len(scores) // _BLOCK
    if blocks < k:
        return np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    maxima = scores[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    ids = np.flatnonzero(scores >= np.partition(maxima, -k)[-k])
    left = scores[ids]
    return ids[left >= np.partition(left, -k)[-k]]


def _logsumexp(values: np.ndarray) -> float:
    top = values.max()
    return float(top + np.log(np.exp(values - top, dtype=np.float32).sum(dtype=np.float64)))
