"""LiteRT engine: the file that ships to phones, run here, for CPUs.

Design choices:
- What runs is an exported file: one that was given, or one exported from a checkpoint into the
  user's cache, once. A `.litertlm` is a bundle; the model inside is unpacked to the cache, where
  the runtime can map it.
- A cache is bound as input and output of the same call, so the runtime writes it in place. Rows
  of a batch are conversations of their own.
- A ring cannot go back further than one token once it is full: what it overwrote is gone. The
  session says so (`_rewind`), and the tokens that stay are read again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.litert_file import LitertFile, LitertTensors
from gemma_multi.checkpoint.litert_format import (
    DECODE,
    HIDDEN,
    HIDDEN_STATE,
    LOGITS,
    POSITIONS,
    PREFILL,
    SCORE,
    SCORE_TOKENS,
    TOKENS,
    cache_names,
    cache_positions,
    cache_scale_names,
)
from gemma_multi.engines.base import Engine, Session
from gemma_multi.engines.litert_runtime import Runtime
from gemma_multi.errors import OptionError
from gemma_multi.files import writable_cache, write_atomically

DEFAULT_CONTEXT = 4096  # a graph's attention costs its whole context, so not all the model has
_log = logging.getLogger("gemma_multi")


def create(
    checkpoint: Checkpoint, precision: str, context_length: int | None = None,
    threads: int | None = None,
) -> Engine:  # fmt: skip
    return LitertEngine(checkpoint, precision, context_length, threads)


class LitertEngine(Engine):
    name = "litert"
    device = "cpu"

    def __init__(
        self, checkpoint: Checkpoint, precision: str, context_length: int | None,
        threads: int | None,
    ) -> None:  # fmt: skip
        super().__init__(checkpoint.config)
        if threads is not None and (type(threads) is not int or threads < 1):
            raise OptionError(f"threads is {threads!r}, expected at least 1")
        if precision == "bfloat16":
            raise OptionError("backend 'litert' computes in float32; use 'float32' or 'int4'")
        self.threads = threads or _available_cores()
        self.file = _ready_file(checkpoint, precision, context_length)
        self.precision = self.file.info.precision
        # XNNPACK rounds each row of activations to int8 in front of an int4 or int8 matrix
        self.compute = "float32" if self.precision == "float32" else "int8"
        self.context_length = self.file.info.context_length
        probe = (DECODE, TOKENS)
        self.runtime = Runtime(self.file.path, self.file.digest, self.threads, probe)

    def _session(self, batch: int, context_length: int) -> Session:
        return LitertSession(self, batch, context_length)


class LitertSession(Session):
    def __init__(self, engine: LitertEngine, batch: int, context_length: int) -> None:
        super().__init__(engine.config, batch, context_length)
        self._engine = engine
        self._rows = [_Row(engine) for _ in range(batch)]

    def hidden(self, ids: Any) -> np.ndarray:
        """Reads tokens; the last hidden state after them, `f32[B, D]`, without the head.

        With it, the logits of a few words cost a few dot products instead of 262,144.
        """
        checked = self._checked(ids)
        return self._reading(
            checked, lambda: np.stack([
                row.read(line, self.length, HIDDEN_STATE)
                for row, line in zip(self._rows, checked, strict=True)
            ])
        )  # fmt: skip

    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        read = _Row.score if every else _Row.last_logits
        return np.stack(
            [read(row, line, self.length) for row, line in zip(self._rows, ids, strict=True)]
        )

    def _rewind(self, length: int) -> bool:
        layers = range(self.config.num_hidden_layers)
        limit = self._engine.context_length
        rings = [cache_positions(self.config, i, limit) for i in layers if
                 self.config.is_sliding(i)]  # fmt: skip
        if not length or not rings or self.length <= rings[0]:
            return True
        return length == self.length - 1  # its slot held what has just left the window

    def _copy(self) -> Session:
        copy = LitertSession(self._engine, self.batch, self.context_length)
        for mine, theirs in zip(self._rows, copy._rows, strict=True):
            theirs.copy_from(mine)
        return copy


class _Row:
    """One conversation's caches, and the calls that read tokens into them."""

    def __init__(self, engine: LitertEngine) -> None:
        self._engine = engine
        self._caches: dict[str, _Cache] = {}
        config, info = engine.config, engine.file.info
        for i in range(config.num_hidden_layers):
            positions = cache_positions(config, i, info.context_length)
            heads, width = config.num_key_value_heads, config.head_dim
            narrow = info.cache == "int8" and not config.is_sliding(i)
            for name, scale in zip(cache_names(i), cache_scale_names(i), strict=True):
                size, kind = heads * positions * width, np.int8 if narrow else np.float32
                self._caches[name] = _Cache(engine.runtime.model, name, size, kind)
                if narrow:
                    scales = _Cache(engine.runtime.model, scale, heads * positions, np.float32)
                    self._caches[scale] = scales
        self._buffers = {name: cache.buffer for name, cache in self._caches.items()}
        self._calls: dict[str, _Call] = {}

    def copy_from(self, other: _Row) -> None:
        for name, cache in other._caches.items():
            self._caches[name].write(cache.read())

    def last_logits(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Logits after the last token: `f32[1, V]`."""
        return self.read(ids, start, LOGITS)[None]

    def read(self, ids: np.ndarray, start: int, wanted: str) -> np.ndarray:
        """Reads `i32[T]`; the logits or the hidden state after the last one."""
        done = 0
        while (left := len(ids) - 1 - done) > 0:
            size = self._chunk(left, start + done)
            count = min(left, size)
            signature = PREFILL.format(size) if size > 1 else DECODE
            self._run(signature, ids[done : done + count], start + done, size)
            done += count
        signature = DECODE if wanted == LOGITS else HIDDEN
        return self._run(signature, ids[done:], start + done, 1)[0]

    def score(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Reads `i32[T]`; the logits after each: `f32[T, V]`."""
        limit = self._engine.context_length
        size = min(SCORE_TOKENS, limit)
        parts, done = [], 0
        while done < len(ids):
            fits = len(ids) - done > 1 and start + done + size <= limit
            count = min(size, len(ids) - done) if fits else 1
            signature, width = (SCORE, size) if fits else (DECODE, 1)
            part = ids[done : done + count]
            parts.append(self._run(signature, part, start + done, width)[:count])
            done += count
        return np.concatenate(parts)

    def _chunk(self, left: int, start: int) -> int:
        """How many tokens to read next. Padding must not reach past the end of the cache."""
        room = self._engine.context_length - start
        sizes = [size for size in self._engine.file.info.prefill if size <= room]
        for size in reversed(sizes):
            if left > size // 2 or size == sizes[0]:
                return size if left > 1 else 1
        return 1

    def _run(self, signature: str, ids: np.ndarray, start: int, size: int) -> np.ndarray:
        if signature not in self._calls:
            self._calls[signature] = _Call(self._engine, signature, size, self._buffers)
        return self._calls[signature].run(ids, start)


class _Cache:
    """A key or value cache in the runtime's memory. Zeros at first: what is masked is finite."""

    def __init__(self, runner: Any, name: str, size: int, kind: Any) -> None:
        self.buffer = runner.create_input_buffer_by_name(DECODE, name)
        self._size, self._kind = size, kind
        self.write(np.zeros(size, kind))

    def read(self) -> np.ndarray:
        return self.buffer.read(self._size, self._kind)

    def write(self, values: np.ndarray) -> None:
        self.buffer.write(values)


class _Call:
    """One signature bound to one row's caches."""

    def __init__(
        self, engine: LitertEngine, signature: str, size: int, caches: dict[str, Any]
    ) -> None:
        self._runner, self._signature, self._size = engine.runtime.model, signature, size
        config, make = engine.config, engine.runtime.model.create_input_buffer_by_name
        self._tokens, self._positions = make(signature, TOKENS), make(signature, POSITIONS)
        self._inputs = {TOKENS: self._tokens, POSITIONS: self._positions, **caches}
        self._outputs = dict(caches)
        self._width = 0
        if signature in (DECODE, SCORE, HIDDEN):
            name = HIDDEN_STATE if signature == HIDDEN else LOGITS
            self._width = config.hidden_size if signature == HIDDEN else config.vocab_size
            self._result = engine.runtime.model.create_output_buffer_by_name(signature, name)
            self._outputs[name] = self._result

    def run(self, ids: np.ndarray, start: int) -> np.ndarray:
        """`i32[count]`, padded to the signature's size; its result, `f32[size, width]`."""
        tokens, positions = np.zeros((2, self._size), np.int32)
        tokens[: len(ids)] = ids
        positions[: len(ids)] = np.arange(start, start + len(ids))  # 0 is how padding is told
        self._tokens.write(tokens)
        self._positions.write(positions)
        self._runner.run_by_name(self._signature, self._inputs, self._outputs)
        if not self._width:
            return np.zeros((self._size, 0), np.float32)
        return self._result.read(self._size * self._width, np.float32).reshape(-1, self._width)


def _ready_file(checkpoint: Checkpoint, precision: str, context_length: int | None) -> LitertFile:
    """The file to run: the one that was opened, or an export of the checkpoint in the cache."""
    tensors = checkpoint.tensors
    if isinstance(tensors, LitertTensors):
        info = tensors.file.info
        if precision not in ("auto", info.precision):
            raise OptionError(
                f"precision is {precision!r}, but {tensors.file.path} was exported as "
                f"{info.precision}; use 'auto', or export again"
            )
        if context_length is not None and context_length > info.context_length:
            raise OptionError(
                f"context_length is {context_length}, but {tensors.file.path} was exported with "
                f"{info.context_length}; export it with more"
            )
        return _unpacked(tensors.file)
    from gemma_multi.exporters.tflite import export

    longest = checkpoint.config.max_position_embeddings
    length = min(DEFAULT_CONTEXT, longest) if context_length is None else context_length
    if type(length) is not int or not 1 <= length <= longest:
        raise OptionError(f"context_length is {length!r}, expected 1 to {longest}")
    target = _cached_export(checkpoint, precision, max(length, 2))
    if not target.exists():
        _log.warning("exporting for LiteRT, once, to %s", target)
        try:
            export(checkpoint, target, context_length=max(length, 2), precision=precision)
        except OptionError:
            if not target.exists():  # another process may have finished first
                raise
    return LitertFile(target)


def _cached_export(checkpoint: Checkpoint, precision: str, context_length: int) -> Path:
    """Where this export lives: the name says all that the file depends on."""
    from gemma_multi import __version__

    facts = repr((
        __version__, checkpoint.identity, sorted(checkpoint.config.to_dict().items(), key=str),
        checkpoint.generation, checkpoint.provenance, precision, context_length,
    ))  # fmt: skip
    name = hashlib.sha256(facts.encode()).hexdigest()[:32]
    return _cache() / f"{name}.tflite"


def _unpacked(file: LitertFile) -> LitertFile:
    """A bundle's model as a file of its own."""
    if file.path.suffix != ".litertlm":
        return file
    target = _cache() / f"{file.digest}.tflite"
    if not target.exists():
        write_atomically(target, file.model_bytes)
    return LitertFile(target)


def _cache() -> Path:
    return writable_cache("litert") or Path(tempfile.mkdtemp(prefix="gemma_multi."))


def _available_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1
