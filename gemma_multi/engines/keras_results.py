"""What reads on Keras give: parts of arrays that stay on the device until NumPy is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


class Shared:
    """An array that several rows are part of, brought over once."""

    def __init__(self, values: Any) -> None:
        self._values = values

    @cached_property
    def numpy(self) -> np.ndarray:
        return np.asarray(self._values)


@dataclass(frozen=True, eq=False)
class Part:
    """A row of an array, and of that the places `at`."""

    of: Shared
    row: int
    at: np.ndarray | None = None

    def numpy(self) -> np.ndarray:
        values = self.of.numpy[self.row]
        if self.at is not None:
            values = values[self.at]
        return values.astype(np.float32, copy=False)


class Chunks:
    """The logits after each token, chunk by chunk on the device, each with its padding."""

    def __init__(self, parts: list[tuple[Any, int]]) -> None:
        self.parts = parts  # (array [T, ...], how many are real)

    def numpy(self) -> np.ndarray:
        return np.concatenate([np.asarray(part)[:count] for part, count in self.parts])
