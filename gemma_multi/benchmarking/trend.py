"""Whether memory grows: a slope and its interval, from samples of a process that works.

Memory that does not grow still moves: caches fill, allocators keep what they got, garbage is
collected now and then. So the first quarter is left out, in which things settle; what is left is
cut into ten blocks, whose medians no passing peak moves; and a line is fitted to those. It is said
to grow where the whole 95% interval of the slope is above zero, it rose by more in all than `NOISE`
of what is held, and the second half of the blocks rises as well: what levels off is no leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 10
LEAST = 40  # samples
NOISE = 1 / 200  # of the memory held
_SETTLING = 1 / 4  # of the samples
_T = 2.306  # Student's t, 8 degrees of freedom, 95% within
FLAT, GROWS, UNCLEAR, SHORT = "flat", "grows", "unclear", "too short"


@dataclass(frozen=True)
class Trend:
    """Bytes by step, of the samples after the first quarter."""

    verdict: str  # FLAT, GROWS, UNCLEAR (it rose, but not steadily) or SHORT
    slope: float  # bytes a step
    low: float
    high: float  # the 95% interval
    grew: float  # bytes in all
    held: float  # bytes in the middle
    visible: float  # bytes a step, from which on a steady rise is more than `NOISE`


def trend(steps: Sequence[float], held: Sequence[float]) -> Trend:
    """Of bytes `held` after so many `steps`."""
    if len(steps) < LEAST:
        return Trend(SHORT, 0.0, -np.inf, np.inf, 0.0, float(np.median(held)), np.inf)
    settled = int(len(steps) * _SETTLING)
    x, y = (
        np.array([np.median(part) for part in np.array_split(np.asarray(all_[settled:]), BLOCKS)])
        for all_ in (steps, held)
    )
    slope, error = _fit(x, y)
    low, high, middle = slope - _T * error, slope + _T * error, float(np.median(y))
    visible = NOISE * middle / float(x[-1] - x[0])
    if slope <= visible:
        verdict = FLAT
    elif low > 0 and _fit(x[BLOCKS // 2 :], y[BLOCKS // 2 :])[0] > slope / 4:
        verdict = GROWS
    else:
        verdict = UNCLEAR
    grew = slope * float(x[-1] - x[0])
    return Trend(verdict, slope, low, high, grew, middle, visible)


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The slope of a line and its standard error."""
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    left = y - y.mean() - slope * away
    return slope, float(np.sqrt(left @ left / (len(x) - 2) / (away @ away)))
