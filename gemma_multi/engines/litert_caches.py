"""A conversation's key and value caches in LiteRT, and the calls that read tokens into them.

A cache is bound as input and output of the same call, so the runtime writes it in place. On a CPU
its memory is looked at where it lies, so that a fork copies what was written and no more. Tokens
are read in chunks, by the signature that suits what is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma_multi.config import ModelConfig
from gemma_multi.engines.caches import fitting
from gemma_multi.engines.litert_runtime import LitertRuntime
from gemma_multi.formats.tflite.file import ExportInfo
from gemma_multi.formats.tflite.layout import (
    BATCH,
    DECODE,
    HIDDEN,
    HIDDEN_STATE,
    HIDDEN_STATES,
    LOGITS,
    POSITIONS,
    PREFILL,
    SCORE,
    SCORE_TOKENS,
    TOKENS,
    TRACE,
    cache_names,
    cache_scale_names,
    cache_shapes,
    of_row,
)


class Caches:
    """One conversation's caches: tokens are read into them."""

    users = 0  # sessions that look at them: more than one while forks have not read on

    def __init__(self, runtime: LitertRuntime, config: ModelConfig, info: ExportInfo) -> None:
        # no engine: one holds spare caches, and would never go
        self._runtime, self._config, self._info = runtime, config, info
        # whether what was read last gave finite numbers, and so all that is held is finite: one
        # that is not, though masked, spoils whatever is computed beside it
        self.is_finite = True
        self._caches: dict[str, _CacheBuffer] = {}
        for i in range(config.num_hidden_layers):
            shapes = cache_shapes(config, i, info.context_length)
            narrow = info.cache == "int8" and not config.is_sliding(i)
            names = zip(cache_names(i), cache_scale_names(i), strict=True)
            for axis, (shape, (name, scale)) in enumerate(zip(shapes, names, strict=True), start=2):
                kind = np.int8 if narrow else np.float32
                self._caches[name] = _CacheBuffer(runtime, name, shape, axis, kind)
                if narrow:
                    flat = (1, config.num_key_value_heads, 1, shape[axis])
                    self._caches[scale] = _CacheBuffer(runtime, scale, flat, 3, np.float32)
        self.buffers = {name: cache.buffer for name, cache in self._caches.items()}
        self._calls: dict[str, _Call] = {}

    def copy_from(self, other: Caches, positions: int) -> None:
        """Takes over what `other` has written, which is no further than `positions`."""
        for name, cache in other._caches.items():
            self._caches[name].take(cache.written(positions))

    def held(self, positions: int) -> dict[str, np.ndarray]:
        """What was written, no further than `positions`, by name."""
        return {name: cache.written(positions).copy() for name, cache in self._caches.items()}

    def restore(self, held: Mapping[str, np.ndarray], positions: int) -> None:
        """Takes over what other caches held. Raises KeyError, ValueError."""
        fit = {
            name: fitting(held, name, cache.written(positions).shape)
            for name, cache in self._caches.items()
        }
        for name, array in fit.items():
            kind = self._caches[name].kind
            if array.dtype != kind:
                raise ValueError(f"{name} is {array.dtype}, expected {kind}")
        for name, array in fit.items():
            self._caches[name].take(array)
        self.is_finite = True

    def last(self, ids: np.ndarray, start: int, signature: str) -> np.ndarray:
        """Reads `i32[T]`; what `signature` gives for the last token: `f32[width]`."""
        self.prefill(ids[:-1], start)
        result = self._run(signature, ids[-1:], start + len(ids) - 1, 1)[0]
        self.is_finite = bool(np.isfinite(result[0]))
        return result

    def prefill(self, ids: np.ndarray, start: int) -> None:
        """Reads `i32[T]` in chunks."""
        self.is_finite = False  # nobody has looked
        done = 0
        while (left := len(ids) - done) > 0:
            size = self._chunk(left, start + done)
            count = min(left, size)
            # of one token the head is not needed
            signature = PREFILL.format(size) if size > 1 else HIDDEN
            self._run(signature, ids[done : done + count], start + done, size)
            done += count

    def score(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Reads `i32[T]`; the logits after each: `f32[T, V]`."""
        self.is_finite = False
        limit = self._info.context_length
        size = min(SCORE_TOKENS, limit)
        logits = np.empty((len(ids), self._config.vocab_size), np.float32)
        done = 0
        while done < len(ids):
            fits = len(ids) - done > 1 and start + done + size <= limit
            count = min(size, len(ids) - done) if fits else 1
            signature, width = (SCORE, size) if fits else (DECODE, 1)
            part = slice(done, done + count)
            logits[part] = self._run(signature, ids[part], start + done, width)[:count]
            done += count
        self.is_finite = bool(np.isfinite(logits[:, 0]).all())
        return logits

    def trace(self, ids: np.ndarray) -> np.ndarray:
        """Reads `i32[T]` from the start; the hidden states of each: `f32[T, (L + 2) * D]`."""
        limit = self._info.context_length
        size = min(SCORE_TOKENS, limit)
        parts, done = [], 0
        while done < len(ids):
            width = size if done + size <= limit else 1
            part = ids[done : done + width]
            parts.append(self._run(TRACE.format(width), part, done, width)[: len(part)])
            done += len(part)
        return np.concatenate(parts)

    def _chunk(self, left: int, start: int) -> int:
        """How many tokens to read next. Padding must not reach past the end of the cache."""
        room = self._info.context_length - start
        sizes = [size for size in self._info.prefill if size <= room]
        for size in reversed(sizes):
            if left > size // 2 or size == sizes[0]:
                return size if left > 1 else 1
        return 1

    def _run(self, signature: str, ids: np.ndarray, start: int, size: int) -> np.ndarray:
        if signature not in self._calls:
            call = _Call(self._runtime, self._config, signature, size, self.buffers)
            self._calls[signature] = call
        return self._calls[signature].run(ids, start)


class BatchCalls:
    """Calls that read one token of each of several conversations."""

    def __init__(self, runtime: LitertRuntime, config: ModelConfig) -> None:
        self._runtime, self._width = runtime, config.vocab_size
        self._buffers: dict[int, tuple[Any, Any, Any]] = {}  # tokens, positions, logits; by rows

    def read(self, rows: Sequence[Caches], ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`i32[N]` each; the logits of each: `f32[N, V]`."""
        count = len(rows)
        signature, runtime = BATCH.format(count), self._runtime
        if count not in self._buffers:
            self._buffers[count] = (
                runtime.input(signature, TOKENS), runtime.input(signature, POSITIONS),
                runtime.output(signature, LOGITS),
            )  # fmt: skip
        tokens, places, result = self._buffers[count]
        held: dict[str, Any] = {}
        for row, caches in enumerate(rows):
            caches.is_finite = False
            held |= {of_row(name, row): buffer for name, buffer in caches.buffers.items()}
        tokens.write(ids)
        places.write(positions)
        inputs = {TOKENS: tokens, POSITIONS: places, **held}
        runtime.run(signature, inputs, {LOGITS: result, **held})
        logits = result.read(count * self._width, np.float32).reshape(count, self._width)
        for caches, of_one in zip(rows, logits, strict=True):
            caches.is_finite = bool(np.isfinite(of_one[0]))
        return logits


class _CacheBuffer:
    """A key or value cache that the runtime works on, or the scales of one. Zeros at first: what is
    masked is finite."""

    def __init__(
        self, runtime: LitertRuntime, name: str, shape: tuple[int, ...], axis: int, kind: Any
    ) -> None:
        """`axis` is that of positions."""
        self.kind, self._shape, self._axis = np.dtype(kind), shape, axis
        self.buffer, self._array = runtime.memory(DECODE, name, shape, self.kind)

    def written(self, positions: int) -> np.ndarray:
        """The first positions, as far as there are so many."""
        array = self._array
        if array is None:  # in a GPU's memory
            array = self.buffer.read(int(np.prod(self._shape)), self.kind).reshape(self._shape)
        return array[self._first(positions)]

    def take(self, array: np.ndarray) -> None:
        """Takes over the first positions of another."""
        first = self._first(array.shape[self._axis])
        if self._array is not None:
            self._array[first] = array
        else:
            whole = np.zeros(self._shape, self.kind)
            whole[first] = array
            self.buffer.write(whole)

    def _first(self, positions: int) -> tuple[slice, ...]:
        return (slice(None),) * self._axis + (slice(positions),)


class _Call:
    """One signature bound to one conversation's caches."""

    def __init__(
        self, runtime: LitertRuntime, config: ModelConfig, signature: str, size: int,
        caches: dict[str, Any],
    ) -> None:  # fmt: skip
        self._runtime, self._signature, self._size = runtime, signature, size
        self._tokens = runtime.input(signature, TOKENS)
        self._positions = runtime.input(signature, POSITIONS)
        self._inputs = {TOKENS: self._tokens, POSITIONS: self._positions, **caches}
        self._outputs = dict(caches)
        states = (config.num_hidden_layers + 2) * config.hidden_size
        results = {
            DECODE: (LOGITS, config.vocab_size),
            SCORE: (LOGITS, config.vocab_size),
            HIDDEN: (HIDDEN_STATE, config.hidden_size),
            TRACE.format(size): (HIDDEN_STATES, states),
        }
        name, self._width = results.get(signature, ("", 0))
        if name:
            self._result = runtime.output(signature, name)
            self._outputs[name] = self._result

    def run(self, ids: np.ndarray, start: int) -> np.ndarray:
        """`i32[count]`, padded to the signature's size; its result, `f32[size, width]`."""
        tokens, positions = np.zeros((2, self._size), np.int32)
        tokens[: len(ids)] = ids
        positions[: len(ids)] = np.arange(start, start + len(ids))  # 0 is how padding is told
        self._tokens.write(tokens)
        self._positions.write(positions)
        self._runtime.run(self._signature, self._inputs, self._outputs)
        if not self._width:
            return np.zeros((self._size, 0), np.float32)
        return self._result.read(self._size * self._width, np.float32).reshape(-1, self._width)
