"""Keras engine: keras-hub's Gemma3Backbone on JAX (or TensorFlow), for GPUs and CPUs.

Design choices:
- The backbone's layers are called one by one, with caches of our own (`keras_decoder`), and the
  head is applied only where logits are wanted: over a vocabulary of 262,144 the head of a
  prompt of 512 tokens would cost half a gigabyte.
- XLA compiles for fixed shapes. Prompts are read in chunks of a few sizes, and the cache of a
  global layer has a few capacities and grows from one to the next.
- int4 weights become their grid values in the compute type: at 270M unpacking every step would
  save memory and cost time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.config import EMBEDDING, SLIDING
from gemma_multi.engines.backend import Backend, Request, has_nvidia_gpu, on_apple_silicon
from gemma_multi.engines.base import (
    ALL,
    HIDDEN,
    LAST,
    NOTHING,
    SPARE,
    Engine,
    Rows,
    Session,
    Wanted,
    ring_reaches,
)
from gemma_multi.engines.keras_backbone import build_backbone, import_keras, weight_slots
from gemma_multi.engines.keras_decoder import Cache, cache_positions, run_layers
from gemma_multi.engines.keras_runtime import KerasRuntime
from gemma_multi.engines.precision import Prepared, prepare
from gemma_multi.quantization.tensor import QuantizedTensor

_CHUNKS = {512: 257, 128: 33, 16: 2, 1: 1}  # tokens -> from how many on padding is worth it
_CAPACITIES = (512, 2048, 8192)  # positions; past these, multiples of the last
_FEWEST_ROWS = 16  # of the head; more go in powers of two, so that few shapes are compiled
_ROWS, _STATES = "rows", "states"  # what a program gives, beside the values of Want


def _create(checkpoint: Checkpoint, request: Request) -> Engine:
    runtime = KerasRuntime(import_keras())
    return KerasEngine(runtime, prepare(checkpoint, request, runtime.fast))


class KerasEngine(Engine):
    name = "keras"

    def __init__(self, runtime: KerasRuntime, prepared: Prepared) -> None:
        checkpoint, self.precision, self.compute = prepared
        super().__init__(checkpoint.config)
        self.runtime, self.device, self.gpu = runtime, runtime.device, runtime.gpu
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

    def _forward(
        self,
        ids: Any,
        caches: list[Cache],
        start: Any,
        count: Any,
        rows: Any,
        *,
        wanted: str,
        fresh: bool,
    ) -> tuple[Any, list[Cache]]:
        """One chunk through the model: (what is wanted, caches). Traced by the framework, so its
        arrays only. Of `i32[1, T]` the first `count` are real; `rows` are token ids,
        whose rows of the head are multiplied."""
        from keras import ops

        backbone = self.backbone
        x, states, written = run_layers(backbone, self.config, ids, caches, start, count, fresh)
        if wanted == _STATES:
            return ops.cast(ops.concatenate([*states, x]), "float32"), written
        if wanted == NOTHING.value:
            return ops.zeros((1,), "float32"), written
        if wanted == ALL.value:
            return ops.cast(backbone.token_embedding(x, reverse=True)[0], "float32"), written
        x = ops.slice(x, (0, count - 1, 0), (1, 1, self.config.hidden_size))
        if wanted == HIDDEN.value:
            return ops.cast(x[0, 0], "float32"), written
        if wanted == _ROWS:
            weights = ops.take(backbone.token_embedding.embeddings, rows, axis=0)
            logits = ops.matmul(ops.cast(weights, x.dtype), x[0, 0])
        else:
            logits = backbone.token_embedding(x, reverse=True)[0, 0]
        return ops.cast(logits, "float32"), written

    def numpy(self, array: Any) -> np.ndarray:
        if isinstance(array, _Chunks):
            return np.concatenate([np.asarray(part)[:count] for part, count in array.parts])
        if isinstance(array, _Padded):
            return np.asarray(array.values)[: array.count]
        return np.asarray(array)

    def new_caches(self, capacity: int) -> list[Cache]:
        zeros, config, caches = self.runtime.zeros, self.config, []
        for i in range(config.num_hidden_layers):
            positions = cache_positions(config, i, capacity)
            shape = (1, positions, config.num_key_value_heads, config.head_dim)
            caches.append((zeros(shape, self.compute), zeros(shape, self.compute)))
        return caches

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        slot = self.slots[name]
        value = slot.variable.value
        if name == EMBEDDING:  # too large to be copied for a few rows
            value, rows = value[rows], slice(None)
        held = slot.restore(np.asarray(value).astype(np.float32))[rows]
        return 1 + held if held.ndim == 1 else held  # a norm multiplies by 1 + w, in float32

    def _session(self, context_length: int) -> Session:
        return KerasSession(self, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        session = KerasSession(self, len(ids))
        parts = session.read_chunks(ids, _STATES, _STATES)
        return np.concatenate([np.asarray(states)[:, :count] for states, count in parts], axis=1)


class _Chunks:
    """The logits after each token, chunk by chunk on the device, each with its padding."""

    def __init__(self, parts: list[tuple[Any, int]]) -> None:
        self.parts = parts  # (array [T, ...], how many are real)


class _Padded:
    """Values of which the first `count` were asked for."""

    def __init__(self, values: Any, count: int) -> None:
        self.values, self.count = values, count


class KerasSession(Session):
    engine: KerasEngine

    def __init__(self, engine: KerasEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self._caches: list[Cache] = []
        self._capacity = 0  # of the global layers' caches
        self._written = 0  # positions ever written since it was empty: what rings have lost

    def _forward(self, ids: np.ndarray, want: Wanted) -> Any:
        if want is ALL:
            return _Chunks(list(self.read_chunks(ids, ALL.value, ALL.value)))
        rows = want.ids if isinstance(want, Rows) else None
        last = _ROWS if isinstance(want, Rows) else want.value
        *_, (result, _) = self.read_chunks(ids, NOTHING.value, last, rows)
        if rows is not None:
            return _Padded(result, len(rows))
        return None if want is NOTHING else result

    def read_chunks(
        self, ids: np.ndarray, wanted: str, last: str, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Any, int]]:
        """(what is `wanted` of each chunk, and of the `last` one, with its padding; how many of
        its tokens are real)."""
        padded_rows = _padded_rows(rows)
        total, done = len(ids), 0
        while done < total:
            width = next(c for c, least in _CHUNKS.items() if total - done >= least)
            chunk = ids[done : done + width]
            start, count = self.length + done, len(chunk)
            self._reserve(start + width)
            self._written = max(self._written, start + count)
            kind = last if done + count == total else wanted
            if width == 1 and kind == ALL.value:
                kind = LAST.value  # one program less
            result, self._caches = self.engine.forward(
                np.pad(chunk, (0, width - count))[None], self._caches, np.int32(start),
                np.int32(count), padded_rows, wanted=kind, fresh=width > 1 and not start,
            )  # fmt: skip
            done += count
            yield result[None] if kind == LAST.value and last == ALL.value else result, count

    def _reserve(self, positions: int) -> None:
        """Makes the caches hold at least so many positions."""
        if positions <= self._capacity:
            return
        step = _CAPACITIES[-1]
        capacity = next((c for c in _CAPACITIES if c >= positions), -(-positions // step) * step)
        if not self._caches:
            self._caches = self.engine.new_caches(capacity)
        else:
            pad = self.engine.runtime.pad_positions
            extra = capacity - self._capacity
            self._caches = [
                cache if self.config.is_sliding(i) else (pad(cache[0], extra), pad(cache[1], extra))
                for i, cache in enumerate(self._caches)
            ]
        self._capacity = capacity

    def _rewind(self, length: int) -> bool:
        if not length:
            self._caches, self._capacity, self._written = [], 0, 0
            return True
        if SLIDING not in self.config.layer_types:
            return True
        window = self.config.sliding_window
        return ring_reaches(self._written, length, window + SPARE, window)

    def _copy(self) -> Session:
        copy = KerasSession(self.engine, self.context_length)
        duplicate = self.engine.runtime.copy
        copy._caches = [(duplicate(keys), duplicate(values)) for keys, values in self._caches]
        copy._capacity, copy._written = self._capacity, self._written
        return copy


def _padded_rows(rows: np.ndarray | None) -> np.ndarray:
    if rows is None:
        return np.zeros(1, np.int32)
    size = max(_FEWEST_ROWS, 1 << (len(rows) - 1).bit_length())
    return np.pad(rows, (0, size - len(rows))).astype(np.int32)


def _modules() -> tuple[str, ...]:
    return ("keras", "keras_hub", os.environ.get("KERAS_BACKEND") or "jax")


def _suits(quantized: bool) -> int:
    if has_nvidia_gpu():
        return 8
    return 2 if on_apple_silicon() else 4


def _advice(engine: Engine) -> str:
    return "on an NVIDIA GPU: pip install 'gemma-multi[cuda]'" if engine.device == "cpu" else ""


def _install() -> str:
    command = "pip install 'gemma-multi[keras]'"
    if sys.version_info >= (3, 14):  # whose tensorflow-text has no wheel there; it is not needed
        command += " && pip install --no-deps keras-hub==0.32.0"
    return f"{command} (or 'gemma-multi[cuda]' for an NVIDIA GPU)"


BACKEND = Backend(
    name="keras",
    title="Keras",
    order=2,
    create=_create,
    modules=_modules,
    packages=("keras", "keras-hub", "jax", "tensorflow"),
    install=_install(),
    precisions=("float32", "bfloat16", "float16", "int4", "int8"),
    suits=_suits,
    trains=True,
    advice=_advice,
)
