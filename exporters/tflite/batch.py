"""The next tokens of several conversations in one call.

Design choices:
- What weights do is done for all rows at once, which is where the time goes: weights are read from
  memory once, and a kernel that unpacks them does it once. Each conversation's attention is a
  graph of its own over its own caches, so conversations of any lengths fit together and their
  caches lie where they lie: nothing is copied to bring them together.
- A row is what `decode` gives for it, to the bit: a product's row is rounded and summed on its own.
- The graph grows with the rows: 14, in three signatures, are 1.5 MB of file and half a second of
  loading (15 MB in int8, whose scales are written with each signature). So a file has these
  signatures only if it is asked for them, and for powers of two only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma_multi.config import ModelConfig
from gemma_multi.exporters.tflite.decoder import TfliteDecoder
from gemma_multi.exporters.tflite.flatbuffer import ModelWriter, Weight
from gemma_multi.exporters.tflite.operators import Subgraph, Value
from gemma_multi.exporters.tflite.positions import Positions, Shape
from gemma_multi.formats.tflite.layout import BATCH, LOGITS, POSITIONS, TOKENS, batch_sizes, of_row


def add_batch_signatures(
    model: ModelWriter, config: ModelConfig, shape: Shape, weights: Mapping[str, Weight],
    gains: Mapping[str, np.ndarray], rows: int,
) -> None:  # fmt: skip
    """For up to so many rows."""
    for size in batch_sizes(rows):
        graph = Subgraph(model, BATCH.format(size))
        BatchDecoder(graph, config, shape, weights, gains, size).build(LOGITS)


class BatchDecoder(TfliteDecoder):
    """One signature: a token of each conversation through all layers."""

    def _begin(self) -> None:
        graph = self.graph
        self.ids = graph.input(TOKENS, (1, self.count), np.int32)
        positions = graph.input(POSITIONS, (self.count,), np.int32)
        self.rows = [
            RowDecoder(self, row, graph.slice(positions, 0, row, 1)) for row in range(self.count)
        ]

    def _attention(self, i: int, qkv: Value) -> Value:
        graph = self.graph
        return graph.concatenate(
            [row._attention(i, graph.slice(qkv, 0, b, 1)) for b, row in enumerate(self.rows)], 0
        )

    def _end(self) -> None:
        for row in self.rows:
            row._end()


class RowDecoder(TfliteDecoder):
    """One conversation of a batch: its caches, and what its position decides."""

    def __init__(self, batch: BatchDecoder, row: int, position: Value) -> None:
        self._number, self._position = row, position
        super().__init__(batch.graph, batch.config, batch.shape, batch.weights, batch.gains, 1)

    def _begin(self) -> None:
        self._take_caches(lambda name: of_row(name, self._number))
        self.positions = Positions(self.graph, self.config, self.shape, self._position)
