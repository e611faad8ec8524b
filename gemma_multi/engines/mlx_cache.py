"""The cache of a sliding layer on MLX: a ring of the window and `SPARE` positions.

mlx-lm's rotating cache cannot be trimmed once it has turned, so a few tokens could not be taken
back without reading the conversation again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.engines.caches import SPARE, ring_reaches

_STEP = 256  # slots by which a ring grows


class Ring:
    """The keys and values of a sliding layer, as mlx-lm's layers use a cache.

    Position p lies in slot p % size. What a slot holds follows from the newest position, so there
    is nothing to clear when tokens are taken back; `written` says what was overwritten since.
    """

    def __init__(self, mx: ModuleType, window: int) -> None:
        self._mx, self._window, self._size = mx, window, window + SPARE
        self._keys: Any = None  # [1, KV, slots, H]; slots grow up to the size
        self._values: Any = None
        self.offset = 0  # tokens read; mlx-lm rotates by it
        self.written = 0

    @property
    def state(self) -> tuple[Any, ...]:
        return () if self._keys is None else (self._keys, self._values)

    def make_mask(self, count: int, window_size: int | None = None, **_: Any) -> Any:
        """Which keys of `update_and_fetch` each of the next `count` tokens may see."""
        if self.offset + count <= self._window:
            return "causal" if count > 1 else None
        return self._mx.array(self.sees(count))

    def sees(self, count: int) -> np.ndarray:
        """The same as `bool[count, keys]`."""
        start = self.offset
        if count == 1:
            slots = np.arange(min(start + 1, self._size))
            return ((start - slots) % self._size < self._window)[None]
        before = min(start, self._window - 1)
        queries, keys = np.arange(count)[:, None], np.arange(-before, count)[None]
        return (keys <= queries) & (keys > queries - self._window)

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Adds `[1, KV, T, H]`; what the tokens may look at, in `make_mask`'s order."""
        mx, start, count = self._mx, self.offset, keys.shape[2]
        end = start + count
        before = min(start, self._window - 1)
        seen = (keys, values)
        if count > 1 and before:
            at = mx.arange(start - before, start) % self._size
            seen = tuple(
                mx.concatenate([mx.take(old, at, axis=2), new], axis=2)
                for old, new in ((self._keys, keys), (self._values, values))
            )
        self._reserve(min(end, self._size), keys)
        kept = min(count, self._size)
        slots = mx.arange(end - kept, end) % self._size
        if kept == 1:
            at = (end - 1) % self._size
            self._keys[:, :, at : at + 1], self._values[:, :, at : at + 1] = keys, values
        else:
            self._keys[:, :, slots] = keys[:, :, -kept:]
            self._values[:, :, slots] = values[:, :, -kept:]
        self.offset, self.written = end, max(self.written, end)
        if count == 1:
            filled = min(end, self._size)
            return self._keys[:, :, :filled], self._values[:, :, :filled]
        return seen

    def _reserve(self, slots: int, like: Any) -> None:
        have = 0 if self._keys is None else self._keys.shape[2]
        if slots <= have:
            return
        more = min(self._size, -(-slots // _STEP) * _STEP) - have
        shape = (1, like.shape[1], more, like.shape[3])
        new = self._mx.zeros(shape, like.dtype)
        if not have:
            self._keys, self._values = new, self._mx.zeros(shape, like.dtype)
            return
        join = self._mx.concatenate
        self._keys, self._values = join([self._keys, new], 2), join([self._values, new], 2)

    def reaches(self, length: int) -> bool:
        """Whether the window of position `length` is still whole."""
        return ring_reaches(self.written, length, self._size, self._window)

    def trim(self, count: int) -> None:
        self.offset -= count

    def restore(self, keys: Any, values: Any, offset: int, written: int) -> None:
        """`[1, KV, slots, H]`, as `state` gave them."""
        self._keys, self._values, self.offset, self.written = keys, values, offset, written

    def copy_from(self, other: Ring) -> None:
        # writing goes through the array object: the copy needs its own
        self._keys, self._values = (None if a is None else self._mx.array(a)
                                    for a in (other._keys, other._values))  # fmt: skip
        self.offset, self.written = other.offset, other.written
