"""Adapter: LoRA's low-rank changes to the linear layers of one model, as a value.

The adapted weight is `W + scale * B A`. How it lies on disk is `formats.peft`'s business, how it
joins a checkpoint `transforms.merge`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma_multi.config import ModelConfig
from gemma_multi.errors import CheckpointError

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes to the linear layers of one model."""

    rank: int
    alpha: float
    tensors: Mapping[str, tuple[np.ndarray, np.ndarray]]  # weight name -> A [r, in], B [out, r]
    base: str = ""  # the model it was trained on, for people
    scaling: float = 0.0  # 0: alpha / rank
    channels: str = ""  # the order of the base's channels; see `Provenance.channels`

    @property
    def scale(self) -> float:
        return self.scaling or self.alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of layers it changes."""
        found = {name.split(".")[-2] for name in self.tensors}
        return tuple(target for target in LINEAR_LAYERS if target in found)

    def check(self, config: ModelConfig, channels: str = "") -> None:
        """Raises CheckpointError where it does not fit a model, naming the tensor, or a model
        whose channels are in another order than its base's."""
        if self.channels != channels:
            raise CheckpointError(
                "the adapter was trained on a model whose channels are in another order, which "
                "calibration changes; merge it into the model it was trained on, and quantise that"
            )
        shapes = config.tensor_shapes()
        for name, (a, b) in self.tensors.items():
            shape = shapes.get(name, ())
            if len(shape) != 2 or (b.shape, a.shape) != (
                (shape[0], self.rank),
                (self.rank, shape[1]),
            ):
                raise CheckpointError(
                    f"the adapter changes {name!r} by {list(b.shape)} times {list(a.shape)}, which "
                    f"does not fit {list(shape)} at rank {self.rank}; is it for another model?"
                )

    def change(self, name: str) -> np.ndarray:
        """What is added to a weight: `f32[out, in]`."""
        a, b = self.tensors[name]
        return self.scale * (b @ a)
