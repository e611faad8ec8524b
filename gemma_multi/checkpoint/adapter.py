"""Adapter: LoRA's low-rank changes to the linear layers of one model, as a value.

The adapted weight is `W + scale * B A`. How it lies on disk is `formats.peft`'s business, how it
joins a checkpoint `transforms.merge`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes to the linear layers of one model."""

    rank: int
    alpha: float
    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]  # weight name -> A [r, in], B [out, r]
    base: str = ""  # the model it was trained on, for people
    scaling: float = 0.0  # 0: alpha / rank

    @property
    def scale(self) -> float:
        return self.scaling or self.alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layers it changes."""
        found = {name.split(".")[-2] for name in self.tensors}
        return tuple(target for target in LINEAR_LAYERS if target in found)

    def change(self, name: str) -> np.ndarray:
        """What is added to a weight: `f32[out, in]`."""
        a, b = self.tensors[name]
        return self.scale * (b @ a)
