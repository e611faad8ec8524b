"""Which examples are learned together, and the arrays they become.

Design choices:
- The order depends on the seed and the epoch alone, so both engines and a resumed run see the
  same batches.
- Shapes are few, because XLA compiles for each: rows are padded to a power of two, or packed to
  `max_length`. Examples of similar length go together, so little is padding.
- Packed examples never see each other: `segments` tells them apart, and attention stays inside.
- The last batch of an epoch is filled up with empty rows, on which no loss is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gemma_multi.training.examples import Examples

_SMALLEST_WIDTH = 32
_POOL = 32  # batches whose examples are sorted by length together
_PACKED_POOL = 1024  # examples that are packed together
IGNORE_INDEX = -1  # a label that no loss is taken on


@dataclass(frozen=True)
class Batch:
    """`K` micro-batches of `B` rows of `T` tokens; their gradients are added up."""

    ids: np.ndarray  # i32[K, B, T]
    labels: np.ndarray  # i32[K, B, T]: the next token where it has a loss, else IGNORE_INDEX
    segments: np.ndarray  # i32[K, B, T]: which example of its row a token belongs to, 0 padding
    examples: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Read, without padding."""
        return int((self.segments > 0).sum())

    @property
    def loss_tokens(self) -> int:
        """On which a loss is taken."""
        return int((self.labels != IGNORE_INDEX).sum())


Rows = list[list[int]]  # each row's examples


@dataclass(frozen=True)
class Batches:
    """The batches of every epoch over some examples."""

    examples: Examples
    batch_size: int
    max_length: int
    accumulate: int = 1
    packing: bool = False
    seed: int = 0

    def count(self, epoch: int) -> int:
        if not self.packing:
            return -(-len(self.examples) // (self.batch_size * self.accumulate))
        return len(self._plan(epoch))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from number `first` on."""
        for rows in self._plan(epoch)[first:]:
            yield self._batch(rows)

    def in_order(self) -> Iterator[Batch]:
        """Every example once, the shortest first; for validation."""
        order = np.argsort(self.examples.lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            yield self._batch([[int(i)] for i in order[start : start + self.batch_size]])

    def _plan(self, epoch: int) -> list[Rows]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.examples))
        rows = self._packed(order) if self.packing else self._by_length(order)
        size = self.batch_size * self.accumulate
        steps = [rows[i : i + size] for i in range(0, len(rows), size)]
        last = steps.pop() if len(steps[-1]) < size else None  # stays last: it is not full
        shuffled = [steps[i] for i in rng.permutation(len(steps))]
        return shuffled if last is None else [*shuffled, last]

    def _by_length(self, order: np.ndarray) -> Rows:
        pool = _POOL * self.batch_size * self.accumulate
        lengths = self.examples.lengths
        parts = [order[i : i + pool] for i in range(0, len(order), pool)]
        sorted_parts = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
        return [[int(i)] for part in sorted_parts for i in part]

    def _packed(self, order: np.ndarray) -> Rows:
        """First fit, the longest first, pool by pool."""
        rows: Rows = []
        lengths = self.examples.lengths
        for start in range(0, len(order), _PACKED_POOL):
            pool = order[start : start + _PACKED_POOL]
            bins: Rows = []
            room: list[int] = []
            for i in pool[np.argsort(-lengths[pool], kind="stable")]:
                need = int(lengths[i]) - 1
                at = next((b for b, free in enumerate(room) if free >= need), len(bins))
                if at == len(bins):
                    bins.append([])
                    room.append(self.max_length)
                bins[at].append(int(i))
                room[at] -= need
            rows += bins
        return rows

    def _batch(self, rows: Rows) -> Batch:
        width = self.max_length
        if not self.packing:
            width = _padded_width(int(self.examples.lengths[rows].max()) - 1, width)
        shape = (-(-len(rows) // self.batch_size) * self.batch_size, width)
        ids, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        labels = np.full(shape, IGNORE_INDEX, np.int32)
        for r, row in enumerate(rows):
            at = 0
            for segment, i in enumerate(row, 1):
                tokens, loss_mask = self.examples.example(i)
                end = at + len(tokens) - 1  # the last token is only ever a label
                ids[r, at:end] = tokens[:-1]
                labels[r, at:end] = np.where(loss_mask[1:], tokens[1:], IGNORE_INDEX)
                segments[r, at:end] = segment
                at = end
        micro = (-1, self.batch_size, width)
        return Batch(
            ids.reshape(micro), labels.reshape(micro), segments.reshape(micro),
            tuple(i for row in rows for i in row),
        )  # fmt: skip


def _padded_width(longest: int, most: int) -> int:
    width = _SMALLEST_WIDTH
    while width < longest:
        width *= 2
    return max(min(width, most), longest)
