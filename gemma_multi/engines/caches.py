"""What the caches of every engine have in common: spare positions of rings, and what was held."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Positions a ring of a sliding layer keeps beyond the window: so many tokens can be taken back
# without reading again, as a driver does that guesses ahead or cuts an answer.
SPARE = 16
MOST_TOGETHER = 128  # sessions in a batch; more are several batches


def fitting(held: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One of the arrays that a session held. Raises KeyError, or ValueError for another shape or
    for numbers that are not finite."""
    array = held[name]
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.kind != "i" and not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return array


def written_of(held: Mapping[str, np.ndarray], length: int, most: int) -> int:
    """How many positions a session that held this had ever written."""
    written = int(fitting(held, "written", (1,))[0])
    if not length <= written <= most:
        raise ValueError(f"{written} positions were written, but {length} are there")
    return written


def ring_reaches(written: int, length: int, size: int, window: int) -> bool:
    """Whether a sliding layer's ring of `size` positions, of which `written` were ever written,
    still holds the window of position `length`: what else was overwritten would be seen."""
    return written <= size or written - length <= size - window + 1
