"""The walk: layer after layer, matrix after matrix, each rounded on what it will be given.

Two streams go through the model beside each other, one with the original weights, one with those
already rounded. A matrix is rounded on the inputs of the second, towards what it gave for those
of the first, so that later matrices make up for what earlier ones lost.

Behind the output and the down projection stands a norm, which divides a token's row by its length:
there an error counts by the length of the row it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np

from gemma_multi.calibration.rounding import HEAD_DAMPING, Moments, round_matrix, toward
from gemma_multi.config import EMBEDDING
from gemma_multi.decoder import (
    ATTENDED,
    ATTENTION,
    FEEDFORWARD,
    GATED,
    INPUTS,
    Decoder,
    weight_name,
)
from gemma_multi.progress import Report, silent
from gemma_multi.quantization.tensor import QuantizedTensor

Streams = list[np.ndarray]  # f32[T, ...] of each text


class Walk:
    """One pass over the layers. `rounded` holds what became of each matrix."""

    def __init__(self, original: Decoder, texts: Sequence[np.ndarray], pool: Executor) -> None:
        self.original, self.pool = original, pool
        self.changed = Decoder(original.config, original.weights.branch())
        self.rounded: dict[str, QuantizedTensor] = {}
        self._before = self._each(original.embed, texts)
        self._after = [x.copy() for x in self._before]

    def layers(self, progress: Report = silent) -> None:
        """Rounds every matrix of every layer."""
        count = self.original.config.num_hidden_layers
        for layer in range(count):
            self._block(layer, ATTENTION, Decoder.attention_input, ATTENDED, Decoder.attended)
            self._block(layer, FEEDFORWARD, Decoder.feedforward_input, GATED, Decoder.gated)
            progress(layer + 1, count)

    def round_embedding(self) -> QuantizedTensor:
        """The embedding, by what it does as the head, on the states that it will be given. How
        often a row is read as an input goes with how often it is written, and the damping keeps it
        near to itself in every direction."""
        states = self._each(self.changed.last_norm, self._after)
        (second,) = self._means(lambda x: (x.T @ x, len(x)), states)
        moments = Moments.of(second, HEAD_DAMPING)
        return round_matrix(self.original.weights[EMBEDDING], moments, self.pool)

    def _block(
        self, layer: int, outer: str, enter: Callable[..., np.ndarray],
        inner: str, inside: Callable[..., np.ndarray],
    ) -> None:  # fmt: skip
        """Attention or the feed-forward part of a layer: the matrices that are given the stream's
        norm, `outer`, then the one that is given what they make, `inner`."""
        before, after = self._both(enter, layer, self._before, self._after)
        self._round_first(layer, outer, before, after)
        before, after = self._both(inside, layer, before, after)
        before = self._each(lambda x: self.original.output(layer, inner, x), before)
        self._round_last(layer, inner, before, after)
        after = self._each(lambda x: self.changed.output(layer, inner, x), after)
        self._before = self._each(
            lambda x, y: self.original.add(layer, inner, x, y), self._before, before
        )
        self._after = self._each(
            lambda x, y: self.changed.add(layer, inner, x, y), self._after, after
        )

    def _both(
        self, step: Callable[..., np.ndarray], layer: int, before: Streams, after: Streams
    ) -> tuple[Streams, Streams]:
        return (
            self._each(lambda x: step(self.original, layer, x), before),
            self._each(lambda x: step(self.changed, layer, x), after),
        )

    def _round_first(self, layer: int, kind: str, before: Streams, after: Streams) -> None:
        """The matrices that read these inputs, by how far the inputs have drifted."""

        def of_text(x: np.ndarray, y: np.ndarray) -> tuple:
            return y.T @ y, (x - y).T @ y, len(y)  # NumPy makes use of the first's symmetry

        second, drift = self._means(of_text, before, after)
        names = [weight_name(layer, module) for module in INPUTS[kind]]
        self._round(second, {name: self.original.weights[name] @ drift for name in names})

    def _round_last(self, layer: int, kind: str, outputs: Streams, after: Streams) -> None:
        """The matrix behind which a norm stands, by how far what it gives has drifted from the
        original's `outputs`; they are fewer numbers than its inputs."""

        def of_text(output: np.ndarray, y: np.ndarray) -> tuple:
            counts = 1 / (np.einsum("td,td->t", output, output) / np.float32(output.shape[1])
                          + np.float32(1e-12))  # fmt: skip
            missing = output - self.original.output(layer, kind, y)
            weighted = y * counts[:, None]
            root = np.sqrt(counts)[:, None] * y
            return root.T @ root, missing.T @ weighted, counts.sum()

        second, missing = self._means(of_text, outputs, after)
        (module,) = INPUTS[kind]
        self._round(second, {weight_name(layer, module): missing})

    def _round(self, second: np.ndarray, missing: Mapping[str, np.ndarray]) -> None:
        """The matrices that share inputs with these moments, each by what it is missing."""
        moments = Moments.of(second)
        for name, lack in missing.items():
            target = toward(self.original.weights[name], moments, lack, self.pool)
            self.rounded[name] = tensor = round_matrix(target, moments, self.pool)
            self.changed.weights.change(name, tensor.dequantize())

    def _means(self, of_text: Callable[..., tuple], *streams: Streams) -> list[np.ndarray]:
        """Over all tokens; `of_text` gives the sums of one text, and last by what they are to be
        divided."""
        parts = self.pool.map(of_text, *streams)
        *sums, total = next(parts)
        for *others, part in parts:
            for whole, other in zip(sums, others, strict=True):
                whole += other
            total += part
        return [whole / np.float32(total) for whole in sums]

    def _each(self, function: Callable[..., np.ndarray], *streams: Sequence[np.ndarray]) -> Streams:
        return list(self.pool.map(function, *streams))
