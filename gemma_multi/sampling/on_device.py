"""The sampler on a device, for many rows at once: what `choose` chooses, where it can.

Design choices:
- Options are arrays, one entry a row, so that one program serves all of them; what of it rows need
  (`Ways`) is known before it is compiled.
- The best of a row are found in two steps: the blocks whose best is among the best, then the best
  of those. Sorting 262,144 scores takes a device longer than a layer.
- A top-k is taken of four times as many candidates, because those that tie with the last all stay
  (scores of bfloat16 often do). Where even more do, nothing is chosen, and the host has to.
- There is no repetition penalty, which depends on all tokens, and no top-p without a top-k, which
  may depend on all scores in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.sampling.noise import (
    as_noise,
    noise_bits,
    position_keys,
    seed_keys,
    seeded,
)
from gemma_multi.sampling.options import GenerationOptions
from gemma_multi.sampling.sampler import COLDEST

_CANDIDATES = (256, 1024)  # of a row, four for each of its top-k
_BLOCK = 32  # scores; about as many blocks as there are scores in those that are looked at
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Ways:
    """How rows choose, beside greedily: of all tokens, or of so many best ones (0: no row does)."""

    of_all: bool
    candidates: int


@dataclass(frozen=True)
class Namespace:
    """Of arrays: NumPy's names for them, and what frameworks call differently."""

    xp: Any
    first: Callable[[Any, int], Any]  # `[B, N]`, k -> places of the k best; of equals, the lower


def can_choose(options: GenerationOptions) -> bool:
    """Whether these options can be done on a device."""
    if options.repetition_penalty != 1:
        return False
    if options.temperature < COLDEST or _draws_of_all(options):
        return True
    return 0 < options.top_k <= _CANDIDATES[-1] // 4


def option_arrays(
    rows: Sequence[GenerationOptions | None], vocabularies: Sequence[int]
) -> tuple[Arrays, Ways]:
    """What `choose_rows` needs of each row's options, None for a row that nobody looks at, and of
    the number of tokens that it may choose from: arrays, and what is compiled."""
    greedy = GenerationOptions(temperature=0.0, seed=0)
    chosen = [options or greedy for options in rows]
    cold = np.array([options.temperature < COLDEST for options in chosen])
    of_all = np.array([_draws_of_all(options) for options in chosen]) & ~cold
    of_best = ~cold & ~of_all
    most = max((o.top_k for o, best in zip(chosen, of_best, strict=True) if best), default=0)
    with np.errstate(divide="ignore"):
        log_min_p = np.log(np.array([o.min_p for o in chosen], np.float32))
    arrays = {
        "of_all": of_all,
        "of_best": of_best,
        "temperature": np.where(cold, 1, [o.temperature for o in chosen]).astype(np.float32),
        "top_k": np.array([max(o.top_k, 1) for o in chosen], np.int32),
        # a sum of probabilities may round to more than 1
        "top_p": np.array([o.top_p if o.top_p < 1 else 2 for o in chosen], np.float32),
        "log_min_p": log_min_p,
        "seed": np.stack([seed_keys(o.seed or 0) for o in chosen]),
        "vocabulary": np.array(vocabularies, np.int32),
    }
    size = next(size for size in _CANDIDATES if size >= 4 * most) if most else 0
    return arrays, Ways(bool(of_all.any()), size)


def choose_rows(
    namespace: Namespace, logits: Any, arrays: Arrays, positions: Any, ways: Ways
) -> Any:
    """The next token of each row of `f32[B, V]`, which will have the index in `positions`,
    `i32[B]`: `i32[B]`, of which -1 says that none could be chosen."""
    xp = namespace.xp
    ids = xp.arange(logits.shape[1])[None]
    scores = xp.where(ids < arrays["vocabulary"][:, None], logits, -np.inf)
    best = scores.max(axis=1)
    chosen = xp.argmax(scores, axis=1).astype(xp.int32)
    # the most of numbers and NaN is, on XLA's CPUs, now and then a number
    finite = xp.isfinite(best) & ~xp.any(xp.isnan(scores), axis=1)
    if ways.of_all or ways.candidates:
        scores = scores / arrays["temperature"][:, None]
        key = position_keys(xp, positions.astype(xp.uint32))[:, None]

        def noise(of: Any) -> Any:
            return as_noise(xp, noise_bits(xp, seeded(xp, arrays["seed"], of), key))

        if ways.of_all:
            least = scores.max(axis=1, keepdims=True) + arrays["log_min_p"][:, None]
            sums = xp.where(scores >= least, scores + noise(ids), -np.inf)
            drawn = xp.argmax(sums, axis=1).astype(xp.int32)
            chosen = xp.where(arrays["of_all"], drawn, chosen)
        if ways.candidates:
            values, of = _best(namespace, scores, min(ways.candidates, logits.shape[1]))
            drawn, fits = _of_best(xp, values, of, noise(of), arrays)
            if values.shape[1] < logits.shape[1]:
                drawn = xp.where(fits, drawn, -1)
            chosen = xp.where(arrays["of_best"], drawn, chosen)
    return xp.where(finite, chosen, -1)


def _of_best(xp: Any, values: Any, ids: Any, noise: Any, arrays: Arrays) -> tuple[Any, Any]:
    """(the token drawn of each row's candidates, which come best first, `[B, M]`; whether all that
    may be drawn are among them)."""
    last = xp.minimum(arrays["top_k"], values.shape[1]) - 1
    least = xp.take_along_axis(values, last[:, None], axis=1)
    weights = xp.where(values >= least, xp.exp(values - values[:, :1]), 0)
    logs = values - values[:, :1] - xp.log(weights.sum(axis=1, keepdims=True))
    probabilities = xp.where(values >= least, xp.exp(logs), 0)
    before = xp.cumsum(probabilities, axis=1) - probabilities
    first = xp.arange(values.shape[1])[None] == 0  # whatever rounds away, the best token stays
    inside = (values >= least) & (first | (before < arrays["top_p"][:, None]))
    inside = inside & (logs >= logs[:, :1] + arrays["log_min_p"][:, None])
    at = xp.argmax(xp.where(inside, logs + noise, -np.inf), axis=1)
    drawn = xp.take_along_axis(ids, at[:, None], axis=1)[:, 0].astype(xp.int32)
    return drawn, values[:, -1] < least[:, 0]


def _best(namespace: Namespace, scores: Any, count: int) -> tuple[Any, Any]:
    """The best of each row, `[B, count]`, and their ids; best first, of equals the lower id."""
    xp = namespace.xp
    rows, size = scores.shape
    if size <= 2 * _BLOCK * count or size % _BLOCK:
        ids = namespace.first(scores, count)
        return xp.take_along_axis(scores, ids, axis=1), ids
    maxima = scores.reshape(rows, size // _BLOCK, _BLOCK).max(axis=2)
    blocks = xp.sort(namespace.first(maxima, count), axis=1)  # so that places go up with ids
    near = (blocks[:, :, None] * _BLOCK + xp.arange(_BLOCK)).reshape(rows, count * _BLOCK)
    values = xp.take_along_axis(scores, near, axis=1)
    at = namespace.first(values, count)
    return xp.take_along_axis(values, at, axis=1), xp.take_along_axis(near, at, axis=1)


def _draws_of_all(options: GenerationOptions) -> bool:
    return options.top_k == 0 and options.top_p == 1
