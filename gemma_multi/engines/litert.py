"""LiteRT engine: the file that ships to phones, run here, for CPUs.

Design choices:
- What runs is an exported file: one that was given, or one exported from a checkpoint into the
  user's cache, once. A `.litertlm` is a bundle; the model inside is unpacked to the cache, where
  the runtime can map it.
- A cache is bound as input and output of the same call, so the runtime writes it in place. Rows
  of a batch are conversations of their own.
- A ring that is full cannot go back further than its spare positions: what it overwrote is gone.
  The session says so (`_rewind`), and the tokens that stay are read again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.litert_file import LitertFile, LitertTensors
from gemma_multi.checkpoint.litert_format import (
    DECODE,
    HIDDEN,
    HIDDEN_STATE,
    HIDDEN_STATES,
    LOGITS,
    POSITIONS,
    PREFILL,
    RING_SPARE,
    SCORE,
    SCORE_TOKENS,
    TOKENS,
    TRACE,
    cache_names,
    cache_positions,
    cache_scale_names,
    ring_positions,
)
from gemma_multi.config import SLIDING, check_context_length
from gemma_multi.engines.base import Engine, Session
from gemma_multi.engines.litert_runtime import Runtime
from gemma_multi.errors import BackendError, CheckpointError, OptionError
from gemma_multi.files import writable_cache, write_atomically
from gemma_multi.quantization.tensor import QuantizedTensor

DEFAULT_CONTEXT = 4096  # a graph's attention costs its whole context, so not all the model has
_MOST_THREADS = 1024
_SMALLEST = 1024  # context of an export in the cache; the others are powers of two
_log = logging.getLogger("gemma_multi")


def create(
    checkpoint: Checkpoint, precision: str, context_length: int | None = None,
    threads: int | None = None,
) -> Engine:  # fmt: skip
    if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
        raise OptionError(f"threads is {threads!r}, expected 1 to {_MOST_THREADS}")
    if precision == "bfloat16":
        raise OptionError("backend 'litert' computes in float32; use 'float32' or 'int4'")
    file = _ready_file(checkpoint, precision, context_length)
    return LitertEngine(file, threads or _available_cores())


class LitertEngine(Engine):
    name = "litert"
    device = "cpu"
    fixed_weights = True

    def __init__(self, file: LitertFile, threads: int, passing: bool = False) -> None:
        """`passing`: the file will not be run again, so what is packed for it is not kept."""
        super().__init__(file.config)
        self.threads = threads
        self.file = file
        self.precision = file.info.precision
        # XNNPACK rounds each row of activations to int8 in front of an int4 or int8 matrix
        self.compute = "float32" if self.precision == "float32" else "int8"
        self.context_length = file.info.context_length
        digest = "" if passing else file.digest
        self.runtime = Runtime(file.path, digest, threads, (DECODE, TOKENS))

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        if len(self.config.tensor_shapes()[name]) == 1:
            return self.file.gain(name)
        held = self.file.read(name)
        if isinstance(held, QuantizedTensor):
            return held.rows(rows).dequantize()
        return held[rows].astype(np.float32)

    def _session(self, batch: int, context_length: int) -> Session:
        return LitertSession(self, batch, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        states = _Row(self._tracing).trace(ids[0])
        layers = self.config.num_hidden_layers + 2
        return states.reshape(len(states), layers, -1).transpose(1, 0, 2)

    @functools.cached_property
    def _tracing(self) -> LitertEngine:
        """This engine over the same tensors in a file that also gives the hidden states."""
        from gemma_multi.exporters.tflite import build

        info = self.file.info
        built = build(
            Checkpoint.open(self.file.path), context_length=info.context_length,
            precision=info.precision, prefill=info.prefill, cache=info.cache, trace=True,
        )  # fmt: skip
        file = _passing(f"{self.file.digest[:32]}.trace", built.write)
        return LitertEngine(file, self.threads, passing=True)


class LitertSession(Session):
    def __init__(self, engine: LitertEngine, batch: int, context_length: int) -> None:
        super().__init__(engine.config, batch, context_length)
        self._engine = engine
        self._written = 0  # positions ever written since the session was empty: what rings lost

    @functools.cached_property
    def _rows(self) -> list[_Row]:
        """Made on first use: a session that reads nothing holds no caches."""
        return [_Row(self._engine) for _ in range(self.batch)]

    def hidden(self, ids: Any) -> np.ndarray:
        """Reads tokens; the last hidden state after them, `f32[B, D]`, without the head.

        With it, the logits of a few words cost a few dot products instead of 262,144.
        """
        checked = self._checked(ids)
        states = self._reading(checked, lambda: self._each(_Row.hidden, checked))
        return states[:, -1]

    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        return self._each(_Row.score if every else _Row.last_logits, ids)

    def _each(self, read: Callable[..., np.ndarray], ids: np.ndarray) -> np.ndarray:
        self._written = max(self._written, self.length + ids.shape[1])
        parts = [read(row, line, self.length) for row, line in zip(self._rows, ids, strict=True)]
        return parts[0][None] if len(parts) == 1 else np.stack(parts)

    def _rewind(self, length: int) -> bool:
        if not length:
            self._written = 0
            return True
        ring = ring_positions(self.config, self._engine.context_length)
        if SLIDING not in self.config.layer_types or self._written <= ring:
            return True
        # what else was overwritten would be in the window
        return self._written - length <= RING_SPARE + 1

    def _copy(self) -> Session:
        copy = LitertSession(self._engine, self.batch, self.context_length)
        copy._written = self._written
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
        """Reads `i32[T]`; the logits after the last token: `f32[1, V]`."""
        return self._read(ids, start, DECODE)

    def hidden(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Reads `i32[T]`; the hidden state after the last token: `f32[1, D]`."""
        return self._read(ids, start, HIDDEN)

    def _read(self, ids: np.ndarray, start: int, last: str) -> np.ndarray:
        """All tokens but one in chunks, and the last by the signature `last`."""
        done = 0
        while (left := len(ids) - 1 - done) > 0:
            size = self._chunk(left, start + done)
            count = min(left, size)
            signature = PREFILL.format(size) if size > 1 else HIDDEN  # the head is not needed
            self._run(signature, ids[done : done + count], start + done, size)
            done += count
        return self._run(last, ids[done:], start + done, 1)

    def score(self, ids: np.ndarray, start: int) -> np.ndarray:
        """Reads `i32[T]`; the logits after each: `f32[T, V]`."""
        limit = self._engine.context_length
        size = min(SCORE_TOKENS, limit)
        logits = np.empty((len(ids), self._engine.config.vocab_size), np.float32)
        done = 0
        while done < len(ids):
            fits = len(ids) - done > 1 and start + done + size <= limit
            count = min(size, len(ids) - done) if fits else 1
            signature, width = (SCORE, size) if fits else (DECODE, 1)
            part = slice(done, done + count)
            logits[part] = self._run(signature, ids[part], start + done, width)[:count]
            done += count
        return logits

    def trace(self, ids: np.ndarray) -> np.ndarray:
        """Reads `i32[T]` from the start; the hidden states of each: `f32[T, (L + 2) * D]`."""
        size = min(SCORE_TOKENS, self._engine.context_length)
        parts, done = [], 0
        while done < len(ids):
            width = size if done + size <= self._engine.context_length else 1
            part = ids[done : done + width]
            parts.append(self._run(TRACE.format(width), part, done, width)[: len(part)])
            done += len(part)
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
        self._runtime, self._signature, self._size = engine.runtime, signature, size
        config, make = engine.config, engine.runtime.model.create_input_buffer_by_name
        self._tokens, self._positions = make(signature, TOKENS), make(signature, POSITIONS)
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
            self._result = engine.runtime.model.create_output_buffer_by_name(signature, name)
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


def _ready_file(checkpoint: Checkpoint, precision: str, context_length: int | None) -> LitertFile:
    """The file to run: the one that was opened, or an export of the checkpoint in the cache."""
    tensors = checkpoint.tensors
    longest = checkpoint.config.max_position_embeddings
    if context_length is not None:
        check_context_length(context_length, longest)
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
    from gemma_multi.exporters.tflite import build

    length = min(DEFAULT_CONTEXT, longest) if context_length is None else context_length
    # a few sizes, so that a cache full of exports that differ by little is not built up
    length = min(1 << (max(length, _SMALLEST) - 1).bit_length(), longest)

    def write(target: Path) -> None:
        _log.warning("exporting for LiteRT, once, to %s", target)
        build(checkpoint, context_length=length, precision=precision).write(target)

    return _cached(_export_name(checkpoint, precision, length), write)


def _unpacked(file: LitertFile) -> LitertFile:
    """A bundle's model as a file of its own."""
    if file.path.suffix != ".litertlm":
        return file
    return _cached(file.digest, lambda target: write_atomically(target, file.model_bytes))


def _export_name(checkpoint: Checkpoint, precision: str, context_length: int) -> str:
    """Says all that an export depends on."""
    facts = (
        _exporter_revision(), checkpoint.identity, json.dumps(checkpoint.config.to_dict()),
        checkpoint.provenance, precision, context_length,
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@functools.cache
def _exporter_revision() -> str:
    """Changes with the code that writes the files."""
    import gemma_multi.exporters.tflite as exporter
    from gemma_multi.checkpoint import litert_file, litert_format

    sources = [*sorted(Path(exporter.__file__).parent.glob("*.py")),
               Path(litert_file.__file__), Path(litert_format.__file__)]  # fmt: skip
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _cached(name: str, write: Callable[[Path], None]) -> LitertFile:
    """A file of the cache, written if it is missing or damaged; a passing one where there is no
    cache, or no room in it."""
    kept = writable_cache("litert")
    if kept is not None:
        target = kept / f"{name}.tflite"
        try:
            if target.exists():
                return LitertFile(target)
        except CheckpointError:
            target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            write(target)
            return LitertFile(target)
    return _passing(name, write)


def _passing(name: str, write: Callable[[Path], None]) -> LitertFile:
    """A file that goes when nobody holds it any more, or this process ends."""
    directory = tempfile.mkdtemp(prefix="gemma_multi.")
    target = Path(directory) / f"{name}.tflite"
    try:
        write(target)
    except OSError as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise BackendError(
            f"backend 'litert' needs room for the model's file, but {target} cannot be written: "
            f"{error.strerror or error}; set GEMMA_MULTI_CACHE to another place"
        ) from error
    file = LitertFile(target)
    weakref.finalize(file, shutil.rmtree, directory, ignore_errors=True)
    return file


def _available_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every platform
        return os.cpu_count() or 1
