"""Find the layer: hidden states side by side, so that the first one that drifts is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_multi.comparison.subjects import Subject
from gemma_multi.comparison.tolerances import Tolerance
from gemma_multi.config import ModelConfig


@dataclass(frozen=True)
class LayersResult:
    """How far the hidden states are apart after each layer, as a share of their size."""

    names: tuple[str, ...]
    drift: tuple[float, ...]  # root mean square over all positions, each against its own size
    first: int | None  # the first that drifts
    position: int | None  # from which position on
    hint: str

    @property
    def passed(self) -> bool:
        return self.first is None

    @property
    def summary(self) -> str:
        if self.first is None:
            worst = int(np.argmax(self.drift))
            return f"no layer drifts; most is {self.drift[worst]:.1e}, {self.names[worst]}"
        return (
            f"{self.names[self.first]} is the first to drift ({self.drift[self.first]:.1e}), from "
            f"position {self.position} on: {self.hint}"
        )


class LayerTrace:
    """Collects prompts for one pair."""

    def __init__(self, config: ModelConfig, allowed: Tolerance) -> None:
        self._config, self._allowed = config, allowed
        layers = config.num_hidden_layers + 2
        self._lost, self._positions = np.zeros(layers), 0
        self._from = np.full(layers, np.iinfo(np.int64).max)

    def add(self, mine: np.ndarray, theirs: np.ndarray) -> None:
        """The reference's hidden states and the other's: `f32[L + 2, T, D]`."""
        lost = np.sum((theirs - mine) ** 2, axis=2, dtype=np.float64)
        size = np.sum(mine**2, axis=2, dtype=np.float64)
        # by position: the first token's states can be a thousand times larger than all others
        lost /= np.maximum(size, np.finfo(np.float32).tiny)
        self._lost += lost.sum(axis=1)
        self._positions += lost.shape[1]
        drifts = ~(lost <= self._allowed.hidden**2)  # NaN drifts
        for layer in np.flatnonzero(drifts.any(axis=1)):
            self._from[layer] = min(self._from[layer], int(drifts[layer].argmax()))

    def result(self) -> LayersResult:
        drift = np.sqrt(self._lost / max(self._positions, 1))
        beyond = np.flatnonzero(~(drift <= self._allowed.hidden))
        first = int(beyond[0]) if len(beyond) else None
        position = None if first is None else int(self._from[first])
        return LayersResult(
            tuple(layer_names(self._config)), tuple(map(float, drift)), first, position,
            "" if first is None or position is None else self._hint(first, position),
        )  # fmt: skip

    def _hint(self, layer: int, position: int) -> str:
        """What such a drift usually is: rotation and the query's scale leave the first token
        alone, which attends to itself only; a window shows where it begins to cut."""
        window = self._config.sliding_window
        if layer == 0:
            return "the embedding or its scale"
        if layer == self._config.num_hidden_layers + 1:
            return "the last norm"
        if position == 0:
            return "its weights, norms or feed-forward part; attention over one token is exact"
        if position >= window - 1 and self._config.is_sliding(layer - 1):
            return f"its sliding window, which is {window}"
        return "its attention: rotation, the query's scale or the mask"


def trace_layers(
    reference: Subject, others: Sequence[Subject], traces: Sequence[LayerTrace], ids: Sequence[int]
) -> None:
    """Adds one prompt to each pair's trace."""
    mine = reference.model.engine.trace(ids)
    for other, trace in zip(others, traces, strict=True):
        trace.add(mine, other.model.engine.trace(ids))


def layer_names(config: ModelConfig) -> list[str]:
    kinds = (
        "sliding" if config.is_sliding(i) else "global" for i in range(len(config.layer_types))
    )
    layers = [f"layer {i} ({kind})" for i, kind in enumerate(kinds)]
    return ["embedding", *layers, "last norm"]
