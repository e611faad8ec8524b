"""The walk: layer after layer, matrix after matrix, each rounded on what it will be given.

Two streams go through the model beside each other, one with the original weights, one with those
already rounded. A matrix is rounded on the inputs of the second, towards what it gave for those
of the first, so that later matrices make up for what earlier ones lost.

Behind the output and the down projection stands a norm, which divides a token's row by its length:
there an error counts by the length of the row it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    NORMED,
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
            self._block(
                layer, (ATTENTION, ATTENDED),
                Decoder.attention_input, Decoder.attended, Decoder.after_attention,
            )  # fmt: skip
            self._block(
                layer, (FEEDFORWARD, GATED),
                Decoder.feedforward_input, Decoder.gated, Decoder.after_feedforward,
            )  # fmt: skip
            progress(layer + 1, count)

    def round_embedding(self) -> QuantizedTensor:
        """The embedding, by what it does as the head, on the states that it will be given. How
        often a row is read as an input goes with how often it is written, and the damping keeps it
        near to itself in every direction."""
        states = self._each(self.changed.last_norm, self._after)
        total = np.float32(sum(map(len, states)))
        second = sum(self.pool.map(lambda x: x.T @ x, states)) / total
        moments = Moments.of(second, HEAD_DAMPING)
        return round_matrix(self.original.weights[EMBEDDING], moments, self.pool)

    def _block(
        self, layer: int, kinds: tuple[str, str], enter: Callable[..., np.ndarray],
        inside: Callable[..., np.ndarray], leave: Callable[..., np.ndarray],
    ) -> None:  # fmt: skip
        """Attention or the feed-forward part of a layer: the matrices that are given the stream's
        norm, then the one that is given what they make."""
        before, after = self._both(enter, layer, self._before, self._after)
        self._round(layer, kinds[0], before, after)
        before, after = self._both(inside, layer, before, after)
        self._round(layer, kinds[1], before, after)
        self._before = self._each(
            lambda x, y: leave(self.original, layer, x, y), self._before, before
        )
        self._after = self._each(lambda x, y: leave(self.changed, layer, x, y), self._after, after)

    def _both(
        self, step: Callable[..., np.ndarray], layer: int, before: Streams, after: Streams
    ) -> tuple[Streams, Streams]:
        return (
            self._each(lambda x: step(self.original, layer, x), before),
            self._each(lambda x: step(self.changed, layer, x), after),
        )

    def _round(self, layer: int, kind: str, before: Streams, after: Streams) -> None:
        """The matrices that read these inputs."""
        names = [weight_name(layer, module) for module in INPUTS[kind]]
        weights: list[np.ndarray | None] = [None] * len(before)
        if kind in NORMED:
            weights = list(self.pool.map(lambda x: self._token_weights(layer, kind, x), before))
        second, drift = self._moments(before, after, weights)
        moments = Moments.of(second)
        for name in names:
            target = toward(self.original.weights[name], moments, drift)
            self.rounded[name] = tensor = round_matrix(target, moments, self.pool)
            self.changed.weights.change(name, tensor.dequantize())

    def _token_weights(self, layer: int, kind: str, x: np.ndarray) -> np.ndarray:
        """What an error in each token's row counts: `f32[T]`, by the original's output."""
        (module,) = INPUTS[kind]
        y = self.original.linear(layer, module, x)
        return 1 / (np.einsum("td,td->t", y, y) / np.float32(y.shape[1]) + np.float32(1e-12))

    def _moments(
        self, before: Streams, after: Streams, weights: Sequence[np.ndarray | None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """`E[x x^T]` of the inputs there are, and `E[x (x_before - x)^T]`, weighted by token."""

        def of_text(x: np.ndarray, y: np.ndarray, w: np.ndarray | None) -> tuple:
            drift, total = x - y, np.float32(len(y))
            if w is not None:
                root = np.sqrt(w)[:, None]
                y, drift, total = y * root, drift * root, w.sum()
            return y.T @ y, y.T @ drift, total  # the first is symmetric, which NumPy makes use of

        parts = self.pool.map(of_text, before, after, weights)
        second, drift, total = next(parts)
        for one, other, part in parts:
            second += one
            drift += other
            total += part
        return second / total, drift / total

    def _each(self, function: Callable[..., np.ndarray], *streams: Sequence[np.ndarray]) -> Streams:
        return list(self.pool.map(function, *streams))
