"""Keras engine: keras-hub's Gemma3Backbone on JAX (or TensorFlow), for GPUs and CPUs.

Design choices:
- The backbone's own layers are called with their caches, as keras-hub's `call_with_cache` does,
  but the head is applied only where logits are wanted: over 262,144 words the head of a prompt of
  512 tokens would cost half a gigabyte.
- XLA compiles for fixed shapes. Prompts are read in chunks of a few sizes, and the cache has a
  few capacities and grows from one to the next. A chunk's padding lands behind the real tokens,
  where causal attention does not look and later tokens overwrite it.
- int4 weights become their grid values in the compute type: at 270M unpacking every step would
  save memory and cost time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.checkpoint import Tensor
from gemma_multi.config import EMBEDDING
from gemma_multi.engines.base import Engine, Session, choose_precision
from gemma_multi.engines.keras_backbone import build_backbone, import_keras, weight_slots
from gemma_multi.engines.keras_runtime import Runtime
from gemma_multi.quantization.tensor import QuantizedTensor

_CHUNKS = {512: 257, 128: 33, 16: 2, 1: 1}  # tokens -> from how many on padding is worth it
_CAPACITIES = (512, 2048, 8192)  # positions; past these, multiples of the last
LAST, EVERY, STATES = "last", "every", "states"


def create(checkpoint: Checkpoint, precision: str) -> Engine:
    return KerasEngine(checkpoint, precision)


class KerasEngine(Engine):
    name = "keras"

    def __init__(self, checkpoint: Checkpoint, precision: str) -> None:
        super().__init__(checkpoint.config)
        self.runtime = Runtime(import_keras())
        self.device = self.runtime.device
        fast = "float32" if self.device == "cpu" else "bfloat16"
        checkpoint, self.precision, self.compute = choose_precision(checkpoint, precision, fast)
        self.backbone = build_backbone(self.config, self.compute)
        self.slots = weight_slots(self.backbone, self.config)
        for name in self.slots:
            self._assign(name, checkpoint.tensors[name])
        self.forward = self.runtime.compile(self._forward, self.backbone.variables)

    def _assign(self, name: str, tensor: Tensor) -> None:
        slot = self.slots[name]
        dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        value = self.runtime.array(dense, self.compute)
        slot.variable._value = self.runtime.as_value(slot.arrange(value), self.compute)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        super().assign(tensors)
        self.forward.refresh()

    def _forward(self, ids: Any, caches: Any, start: Any, last: Any, *, wanted: str) -> Any:
        """One chunk through the model: (what is wanted, caches). Traced by the framework, so its
        arrays only. `wanted` is LAST's or EVERY token's logits, or the hidden STATES."""
        from keras import ops

        backbone = self.backbone
        x = backbone.token_embedding(ids)
        x = x * ops.cast(self.config.embedding_scale, x.dtype)
        states, written = [x], []
        for layer, cache in zip(backbone.transformer_layers, caches, strict=True):
            x, cache = layer(x, cache=cache, cache_update_index=start)
            written.append(cache)
            states.append(x)
        x = backbone.layer_norm(x)
        if wanted == STATES:
            return ops.cast(ops.concatenate([*states, x]), "float32"), written
        if wanted == LAST:
            x = ops.slice(x, (0, last, 0), (ids.shape[0], 1, self.config.hidden_size))
        logits = backbone.token_embedding(x, reverse=True)
        return ops.cast(logits, "float32"), written

    def new_caches(self, batch: int, capacity: int) -> list[tuple[Any, Any]]:
        shape = (batch, capacity, self.config.num_key_value_heads, self.config.head_dim)
        zeros = self.runtime.zeros
        return [
            (zeros(shape, self.compute), zeros(shape, self.compute))
            for _ in range(self.config.num_hidden_layers)
        ]

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        slot = self.slots[name]
        value = slot.variable.value
        if name == EMBEDDING:  # too large to be copied for a few rows
            value, rows = value[rows], slice(None)
        held = slot.restore(np.asarray(value).astype(np.float32))[rows]
        return 1 + held if held.ndim == 1 else held  # a norm multiplies by 1 + w, in float32

    def _session(self, batch: int, context_length: int) -> Session:
        return KerasSession(self, batch, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        session = KerasSession(self, 1, ids.shape[1])
        return np.concatenate(list(session.read_chunks(ids, STATES)), axis=1)


class KerasSession(Session):
    def __init__(self, engine: KerasEngine, batch: int, context_length: int) -> None:
        super().__init__(engine.config, batch, context_length)
        self._engine = engine
        self._caches: list[tuple[Any, Any]] = []
        self._capacity = 0

    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        if every:
            parts = list(self.read_chunks(ids, EVERY))
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        *_, logits = self.read_chunks(ids, LAST)
        return logits

    def read_chunks(self, ids: np.ndarray, wanted: str) -> Iterator[np.ndarray]:
        """What is `wanted` of each chunk, without its padding."""
        total, position = ids.shape[1], 0
        while position < total:
            width = next(c for c, least in _CHUNKS.items() if total - position >= least)
            chunk = ids[:, position : position + width]
            start, count = self.length + position, chunk.shape[1]
            self._reserve(start + width)
            padded = np.pad(chunk, ((0, 0), (0, width - count)))
            result, self._caches = self._engine.forward(
                padded, self._caches, np.int32(start), np.int32(count - 1),
                wanted=LAST if width == 1 and wanted == EVERY else wanted,  # one program less
            )  # fmt: skip
            position += count
            yield np.asarray(result)[:, :count]

    def _reserve(self, positions: int) -> None:
        """Makes the caches hold at least so many positions."""
        if positions <= self._capacity:
            return
        step = _CAPACITIES[-1]
        capacity = next((c for c in _CAPACITIES if c >= positions), -(-positions // step) * step)
        if not self._caches:
            self._caches = self._engine.new_caches(self.batch, capacity)
        else:
            pad = self._engine.runtime.pad_positions
            extra = capacity - self._capacity
            self._caches = [(pad(keys, extra), pad(values, extra)) for keys, values in self._caches]
        self._capacity = capacity

    def _rewind(self, length: int) -> bool:
        if not length:
            self._caches, self._capacity = [], 0
        return True  # positions behind the last token are never looked at

    def _copy(self) -> Session:
        copy = KerasSession(self._engine, self.batch, self.context_length)
        duplicate = self._engine.runtime.copy
        copy._caches = [(duplicate(keys), duplicate(values)) for keys, values in self._caches]
        copy._capacity = self._capacity
        return copy
