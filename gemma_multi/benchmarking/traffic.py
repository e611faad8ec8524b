"""Bytes that a model's arithmetic has to move: an estimate from below, by shapes and types.

A step of decoding reads every weight once (the head is the embedding, so that is read whole) and,
of the cache, keys and values of each position that a layer attends to: all of them on a global
layer, at most the sliding window on another. It writes those of its own position. A prompt's
tokens are read together and share one reading of the weights. Activations stay in the
processor's caches and are not counted; an engine that reads its whole cache, full or not, moves
more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemma_multi.config import ModelConfig
from gemma_multi.model import Model

# of a weight, with its share of a scale in 16 bits for 32 weights
BITS = {"int4": 4.5, "int8": 8.5, "sfp8": 8, "bfloat16": 16, "float16": 16, "float32": 32}
_CACHED = {"bfloat16": 2, "float16": 2}  # bytes of a number in a cache, by what is computed in


def weight_bytes(config: ModelConfig, precision: str) -> int:
    """All weights, matrices in `precision`; norms are in the width of what is computed in, and so
    few that they are counted in the same."""
    return round(config.num_parameters * BITS[precision] / 8)


@dataclass(frozen=True)
class Traffic:
    """What reads of one model move."""

    config: ModelConfig
    weights: int
    width: int  # bytes of a number in the cache

    @classmethod
    def of(cls, model: Model) -> Traffic:
        checkpoint, engine = model.checkpoint, model.engine
        weights = sum(
            math.prod(info.shape) * BITS[info.dtype] / 8
            for info in checkpoint.tensors.infos.values()
        )
        if engine.precision != checkpoint.precision:
            weights = weight_bytes(model.config, engine.precision)
        return cls(model.config, round(weights), _CACHED.get(engine.compute, 4))

    def read(self, position: int, tokens: int) -> int:
        """Of reading so many tokens together after `position` others."""
        config, end = self.config, position + tokens
        rows = sum(
            min(end, config.sliding_window + tokens - 1) if config.is_sliding(i) else end
            for i in range(config.num_hidden_layers)
        )
        rows += tokens * config.num_hidden_layers  # those that are written
        return self.weights + rows * 2 * config.num_key_value_heads * config.head_dim * self.width

    def turn(self, position: int, read: int, write: int) -> int:
        """Of an answer: the prompt, and a step for each of its tokens but the last, which nobody
        has read yet."""
        start = position + read
        return self.read(position, read) + sum(self.read(start + i, 1) for i in range(write - 1))
