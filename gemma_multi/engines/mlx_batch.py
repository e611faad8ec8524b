"""Many sessions through mlx-lm's layers at once: rows of one batch, each with caches of its own.

What all rows share is read once, the weights; a layer's caches stay where they are, one a session,
so that sessions come and go as they like. For attention their keys and values are laid side by
side, padded to the longest: Gemma 3 270M has one key/value head, and its caches are small beside
its weights.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.engines.mlx_cache import Ring


class SideBySide:
    """The caches that some sessions have of one layer, as mlx-lm's layers use a cache.

    Row i reads `counts[i]` tokens of as many as the longest has; the rest is padding, which sees
    the first key, so that it is finite, and is not written.
    """

    def __init__(self, mx: ModuleType, caches: list[Any], counts: list[int]) -> None:
        self._mx, self._caches, self._counts = mx, caches, counts
        self.offset = mx.array([cache.offset for cache in caches])  # mlx-lm rotates by it

    def make_mask(self, count: int, **_: Any) -> Any:
        """`bool[B, 1, T, S]`: which of `update_and_fetch`'s keys each token sees."""
        rows = [
            cache.sees(own) if isinstance(cache, Ring) else _sees_all(cache.offset, own)
            for cache, own in zip(self._caches, self._counts, strict=True)
        ]
        mask = np.zeros((len(rows), 1, count, max(row.shape[1] for row in rows)), bool)
        mask[..., 0] = True
        for i, row in enumerate(rows):
            mask[i, 0, : row.shape[0], : row.shape[1]] = row
        return self._mx.array(mask)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Adds the real ones of `[B, KV, T, H]`, each row to its cache; what all may look at."""
        seen = [
            cache.update_and_fetch(keys[i : i + 1, :, :own], values[i : i + 1, :, :own])
            for i, (cache, own) in enumerate(zip(self._caches, self._counts, strict=True))
        ]
        longest = max(own.shape[2] for own, _ in seen)
        return self._side_by_side([own for own, _ in seen], longest), self._side_by_side(
            [own for _, own in seen], longest
        )

    def _side_by_side(self, rows: list[Any], longest: int) -> Any:
        pad = self._mx.pad
        return self._mx.concatenate([
            pad(row, ((0, 0), (0, 0), (0, longest - row.shape[2]), (0, 0))) for row in rows
        ])  # fmt: skip


def _sees_all(before: int, count: int) -> np.ndarray:
    """`bool[count, before + count]` of a global layer."""
    return np.arange(before + count) <= before + np.arange(count)[:, None]
