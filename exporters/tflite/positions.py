"""What follows from the positions that go into a call, worked out once for all layers.

Design choices:
- A sliding layer's cache is a ring: position p lies in slot p % R. What a slot holds is worked
  out from the position alone (`_ring_ages`): there is nothing to clear and no mask to pass in.
- What differs by row comes from the positions that go in, never from a constant of one column: the
  GPU delegate takes such a constant's first row for all. (One of equal rows is fine.)
- Masks are arithmetic, `(clip(distance, 0, 1) - 1) * 32768`, because the CPU delegate has no
  comparisons; ones and zeros that select are multiplied for the same reason.
- A GPU may hold every number in float16, which has whole numbers to 2,048 and ends at 65,504. So
  positions are subtracted as integers, masks stay above -65,504, and in a file for GPUs angles are
  looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.config import ModelConfig
from gemma_multi.exporters.tflite.flatbuffer import Weight
from gemma_multi.exporters.tflite.operators import Subgraph, Value
from gemma_multi.formats.tflite.layout import ring_positions

_MASKED = np.float32(-32768)  # far below any score, and a number in float16 as well
_STEP = 64  # of the coarse table of angles


@dataclass(frozen=True)
class Shape:
    """What an export fixes besides the model."""

    context_length: int
    prefill: tuple[int, ...]
    int8_global_caches: bool = False
    trace: bool = False  # adds the signatures that give every layer's hidden states
    gpu: bool = False  # the file is for GPUs: right in float16, too


class Positions:
    """The masks, rotations and ring slots of one signature, from the `i32[T]` that go into it."""

    def __init__(
        self, graph: Subgraph, config: ModelConfig, shape: Shape, positions: Value
    ) -> None:
        self._graph, self._shape, self._all = graph, shape, positions
        self._width, self._window = config.head_dim, config.sliding_window
        self.count = positions.shape[0]
        self.ring = ring_positions(config, shape.context_length)  # slots of one
        self.start = graph.slice(positions, 0, 0, 1)  # i32[1]
        self._offsets = np.arange(self.count, dtype=np.float32)  # of each from the start
        self.global_mask, self.local_mask = self._masks()
        self.rotations = {  # by whether the layer is a sliding one
            False: self._rotation(config.rope_theta, config.rope_scaling_factor),
            True: self._rotation(config.rope_local_theta, 1.0),
        }
        if self.count > 1:
            self.ring_update = self._ring_update(config.num_key_value_heads)

    # masks

    def _masks(self) -> tuple[Value, Value]:
        """What is added to scores: global `[T, C (+ T)]` and local `[T, R (+ T)]`.

        The columns are the cache's slots and, unless it was written first, this call's tokens.
        """
        graph, t = self._graph, self.count
        alone = t == 1  # and written before the cache is looked at
        held = graph.add(self.start, np.int32(1)) if alone else self.start  # by the cache
        slots = np.arange(self._shape.context_length, dtype=np.int32)[None]
        written = self._mask(graph.cast(graph.subtract(held, slots), np.float32))
        # a slot of age a holds position held - 1 - a
        ages = self._ring_ages()
        filled = self._mask(graph.cast(graph.subtract(held, ages), np.float32))
        reach: Any = np.float32(self._window)  # of a query, in ages
        if not alone:
            ahead = graph.cast(graph.subtract(self._all, self.start), np.float32)
            reach = graph.subtract(self._window - 1, graph.reshape(ahead, (t, 1)))
        reached = self._mask(graph.subtract(reach, graph.cast(ages, np.float32)))
        local = graph.minimum(filled, reached)
        if alone:
            return written, local
        after = self._offsets - self._offsets[:, None]  # of a key to a query: positive is later
        causal = np.where(after <= 0, 0, _MASKED).astype(np.float32)
        near = np.where((after <= 0) & (after > -self._window), 0, _MASKED).astype(np.float32)
        written = graph.add(written, np.zeros((t, 1), np.float32))  # the same for every row
        return (
            graph.concatenate([written, graph.constant(causal)], 1),
            graph.concatenate([local, graph.constant(near)], 1),
        )

    def _mask(self, distance: Value) -> Value:
        """0 where the whole number `distance` is at least 1, else far below any score."""
        graph = self._graph
        seen = graph.minimum(graph.maximum(distance, 0.0), 1.0)
        return graph.multiply(graph.subtract(seen, 1.0), -_MASKED)

    def _ring_ages(self) -> Value:
        """How far behind the newest position in the cache each slot's is: `i32[1, R]`."""
        graph, slots = self._graph, self.ring
        newest = 0 if self.count == 1 else -1  # from the start of this call
        ages = graph.add(self.start, newest - np.arange(slots, dtype=np.int32))
        return graph.reshape(graph.floor_mod(ages, np.int32(slots)), (1, slots))

    # rotations

    def _rotation(self, theta: float, factor: float) -> tuple[Value, Value]:
        """Cosines, and sines with the sign of the half they multiply: `f32[T, 1, H]` each."""
        graph, width = self._graph, self._width
        frequencies = theta ** (-np.arange(0, width, 2) / width) / factor
        if self._shape.gpu:
            cos, sin = self._looked_up_rotation(frequencies)
        else:
            position = graph.reshape(graph.cast(self._all, np.float32), (self.count, 1))
            angles = graph.multiply(position, frequencies[None].astype(np.float32))
            cos, sin = graph.cos(angles), graph.sin(angles)
        shape = (self.count, 1, width)
        return (
            graph.reshape(graph.concatenate([cos, cos], 1), shape),
            graph.reshape(graph.concatenate([graph.negative(sin), sin], 1), shape),
        )

    def _looked_up_rotation(self, frequencies: np.ndarray) -> tuple[Value, Value]:
        """Cosines and sines, `f32[T, H / 2]` each, without the angle, which float16 could not hold:
        its numbers are a radian apart at 2,000. A position is 64 a + b; tables have the cosines
        and sines of either part, and the angles' sum follows from them."""
        graph = self._graph
        low = graph.floor_mod(self._all, np.int32(_STEP))
        high = graph.subtract(self._all, low)
        steps = -(-self._shape.context_length // _STEP)
        cos_high, sin_high = self._looked_up(high, _STEP, steps, frequencies)
        cos_low, sin_low = self._looked_up(low, 1, _STEP, frequencies)
        return (
            graph.subtract(graph.multiply(cos_high, cos_low), graph.multiply(sin_high, sin_low)),
            graph.add(graph.multiply(sin_high, cos_low), graph.multiply(cos_high, sin_low)),
        )

    def _looked_up(
        self, part: Value, step: int, count: int, frequencies: np.ndarray
    ) -> tuple[Value, Value]:
        """The cosines and sines of each frequency times `part`: `i32[T]`, each one of `count`
        multiples of `step`."""
        graph, half = self._graph, len(frequencies)
        row = graph.reshape(graph.cast(part, np.float32), (self.count, 1))
        row = graph.multiply(row, 1 / step)
        chosen = self._one_of(row, np.arange(count, dtype=np.float32)[None])
        angles = frequencies[:, None] * (step * np.arange(count))
        table = np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32)
        name = f"rotation.{frequencies[-1]:.6g}.{step}"
        both = graph.linear(chosen, Weight(name, table.shape, 32, lambda: table, table.nbytes))
        return graph.slice(both, 1, 0, half), graph.slice(both, 1, half, half)

    def _one_of(self, place: Value, places: np.ndarray) -> Value:
        """A one where `place` is that one of `places`, which are whole numbers, else zeros."""
        graph = self._graph
        away = graph.absolute(graph.subtract(place, places))
        return graph.maximum(graph.subtract(np.float32(1), away), 0.0)

    # what many tokens write into a ring

    def _ring_update(self, heads: int) -> tuple[Value, Value]:
        """Which row each slot takes, `f32[1, KV, R, T]`, and which slots keep theirs, `[R, 1]`."""
        graph, slots = self._graph, self.ring
        last = graph.max_last(self._all)  # padding has position 0
        behind = graph.floor_mod(
            graph.subtract(last, np.arange(slots, dtype=np.int32)), np.int32(slots)
        )
        row = graph.subtract(graph.subtract(last, self.start), behind)  # i32[R], < 0: keep
        row = graph.reshape(graph.cast(row, np.float32), (1, 1, slots, 1))
        takes = self._one_of(row, self._offsets.reshape(1, 1, 1, -1))
        keeps = graph.minimum(graph.maximum(graph.negative(row), 0.0), 1.0)
        return graph.concatenate([takes] * heads, 1), keeps
