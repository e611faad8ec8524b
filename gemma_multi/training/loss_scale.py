"""Gradients large enough for float16, which has no number between 0 and 6e-8.

What comes back from the loss is multiplied by a power of two, and gradients are divided by it again
in float32 (Micikevicius et al., 2018). Where they overflow, the scale is halved and the same batch
is computed again: no row is left out, and a run's steps are those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

_START, _MOST = 2.0**12, 2.0**24
_PATIENCE = 200  # steps without an overflow, after which the scale is doubled
_STATE = "loss_scale"  # (value, steps since it changed), among the optimiser's arrays

Result = TypeVar("Result")


class LossScale:
    """The scale of one run. Without `needed` it stays 1, and nobody has to look at gradients."""

    def __init__(self, needed: bool) -> None:
        self.needed = needed
        self.value = _START if needed else 1.0
        self._steps = 0

    def apply(
        self, compute: Callable[[float], Result], is_finite: Callable[[Result], bool]
    ) -> Result:
        """`compute(scale)`, again with smaller scales until it is finite. What is not at 1 either
        is what it is."""
        result = compute(self.value)
        if not self.needed:
            return result
        while not is_finite(result) and self.value > 1:
            self.value, self._steps = self.value / 2, 0
            result = compute(self.value)
        self._steps += 1
        if self._steps >= _PATIENCE:
            self.value, self._steps = min(self.value * 2, _MOST), 0
        return result

    def state(self) -> dict[str, np.ndarray]:
        """For a saved run; nothing where it is not needed."""
        if not self.needed:
            return {}
        return {_STATE: np.array([self.value, self._steps], np.float64)}

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.needed:
            self.value, self._steps = float(state[_STATE][0]), int(state[_STATE][1])
