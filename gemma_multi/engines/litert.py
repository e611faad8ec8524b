"""LiteRT engine: the file that ships to phones, run here, on CPUs and by its GPU delegate.

Design choices:
- What runs is an exported file: one that was given, or one exported from a checkpoint into the
  user's cache, once (`litert_files`).
- A cache is bound as input and output of the same call, so the runtime writes it in place.
- A conversation's caches are 23 MB at 4,096 positions, and making them takes longer than reading
  a token. Those of conversations that have ended are used again as they are: what is masked only
  has to be finite. A fork shares its origin's until one of the two reads on, and then copies what
  was read, not the room behind it.
- A ring that is full cannot go back further than its spare positions: what it overwrote is gone.
  The session says so (`_rewind`), and the tokens that stay are read again.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.config import EMBEDDING, SLIDING, ModelConfig
from gemma_multi.engines.backend import Backend, Request, has_nvidia_gpu, on_apple_silicon
from gemma_multi.engines.base import (
    ALL,
    HIDDEN,
    NOTHING,
    Engine,
    Rows,
    Session,
    Wanted,
    ring_reaches,
)
from gemma_multi.engines.litert_files import passing_file, ready_file
from gemma_multi.engines.litert_runtime import LitertRuntime, Place
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.exporters import tflite
from gemma_multi.formats.tflite.file import TfliteFile
from gemma_multi.formats.tflite.layout import (
    DECODE,
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
    cache_positions,
    cache_scale_names,
    ring_positions,
)
from gemma_multi.formats.tflite.layout import HIDDEN as HIDDEN_SIGNATURE
from gemma_multi.machine import available_cores
from gemma_multi.options import option
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.transforms import fit_float16

_MOST_THREADS = 1024
_MOST_SPARE = 4  # conversations whose caches are kept when they end
_HEAD_BYTES = 1 << 26  # of the rows of the head that are kept for sets of token ids


@dataclass(frozen=True)
class LitertOptions:
    threads: int | None = option(None, "Processor cores to use; all there are if unset.")
    device: str = option("cpu", "cpu, or gpu: LiteRT's GPU delegate.")
    enforce_f32: bool = option(False, "Compute in float32 on a GPU that has float16.")

    def __post_init__(self) -> None:
        if self.device not in tflite.TARGETS:
            raise OptionError(f"device is {self.device!r}, expected {' or '.join(tflite.TARGETS)}")
        if self.enforce_f32 and self.device == "cpu":
            raise OptionError("enforce_f32 is for device 'gpu'; CPUs compute in float32")
        threads = self.threads
        if threads is not None and (type(threads) is not int or not 1 <= threads <= _MOST_THREADS):
            raise OptionError(f"threads is {threads!r}, expected 1 to {_MOST_THREADS}")


def _create(checkpoint: Checkpoint, request: Request) -> Engine:
    options = request.options
    place = Place(
        options.threads or available_cores(), options.device == "gpu", options.enforce_f32
    )
    if place.gpu and not place.enforce_f32:
        checkpoint = fit_float16(checkpoint)
    file = ready_file(checkpoint, request)
    if place.gpu:
        _check_gpu(file, checkpoint.config.residual_scale)
    return LitertEngine(file, place)


def _check_gpu(file: TfliteFile, scale: float) -> None:
    """Raises BackendError for a file that a GPU would not run, or not right: one whose residual
    stream is carried at more than `scale`."""
    again = "export the model again with target='gpu'"
    if file.info.precision == "int4":
        raise BackendError(
            f"{file.path} holds int4 in blocks, on which LiteRT's GPU delegate ends the process; "
            f"{again}"
        )
    if file.config.residual_scale > scale:
        raise BackendError(
            f"{file.path} carries activations at a size that float16 does not hold; {again}, or "
            "load it with enforce_f32=True"
        )


class LitertEngine(Engine):
    name = "litert"
    fixed_weights = True

    def __init__(self, file: TfliteFile, place: Place, passing: bool = False) -> None:
        """`passing`: the file will not be run again, so what is packed for it is not kept."""
        super().__init__(file.config)
        self.place = place
        self.device = "gpu" if place.gpu else "cpu"
        self.file = file
        self.precision = file.info.precision
        # XNNPACK rounds each row of activations to int8 in front of an int4 or int8 matrix
        self.compute = "float32" if self.precision == "float32" else "int8"
        if place.gpu:
            self.compute = "float32" if place.enforce_f32 else "float16"
        self.context_length = file.info.context_length
        digest = "" if passing else file.digest
        self.runtime = LitertRuntime(file.path, digest, place, (DECODE, TOKENS))
        self.gpu = self.runtime.gpu
        self._spare: list[_Caches] = []
        # the rows of the head for a set of token ids, as they would be multiplied
        self._heads: dict[bytes, np.ndarray] = {}

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        if len(self.config.tensor_shapes()[name]) == 1:
            return self.file.gain(name)
        return _dense(self.file.read(name, rows))

    def head_rows(self, hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """`f32[D]` -> the logits of some tokens, from exact weights and activations."""
        key = ids.tobytes()
        head = self._heads.get(key)
        if head is None:
            head = _dense(self.file.read(EMBEDDING, ids))
            kept = sum(other.nbytes for other in self._heads.values())
            if kept + head.nbytes > _HEAD_BYTES:
                self._heads.clear()
            if head.nbytes <= _HEAD_BYTES:
                self._heads[key] = head
        logits: np.ndarray = head @ hidden
        return logits

    def borrow(self) -> _Caches:
        """Caches for one conversation; what they hold is somebody's past, and never seen."""
        try:
            return self._spare.pop()
        except IndexError:
            return _Caches(self)

    def give_back(self, caches: _Caches) -> None:
        if len(self._spare) < _MOST_SPARE:
            self._spare.append(caches)

    def _session(self, context_length: int) -> Session:
        return LitertSession(self, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        states = _Caches(self._tracing).trace(ids)
        layers = self.config.num_hidden_layers + 2
        return states.reshape(len(states), layers, -1).transpose(1, 0, 2)

    @functools.cached_property
    def _tracing(self) -> LitertEngine:
        """This engine over the same tensors in a file that also gives the hidden states."""
        info = self.file.info
        options = tflite.TfliteOptions(
            info.context_length, info.prefill, info.precision, info.cache
        )
        built = tflite.build(self.file.checkpoint("tflite"), options, trace=True)
        file = passing_file(f"{self.file.digest[:32]}.trace", built.write)
        return LitertEngine(file, self.place, passing=True)


def _dense(tensor: Tensor) -> np.ndarray:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor.astype(np.float32)


class LitertSession(Session):
    engine: LitertEngine

    def __init__(self, engine: LitertEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self._written = 0  # positions ever written since it was empty: what rings have lost
        self._holding = _Holding(engine)
        # back to the engine when nobody holds this session any more
        weakref.finalize(self, self._holding.take, None)

    def own_caches(self) -> _Caches:
        """This session's caches, to be written: borrowed on first use, and a copy where a fork
        still looks at them."""
        held = self._holding.caches
        if held is None or held.users > 1:
            caches = self.engine.borrow()
            if held is not None and self._written:
                caches.copy_from(held, self._written)
            self._holding.take(caches)
            return caches
        return held

    def _forward(self, ids: np.ndarray, want: Wanted) -> np.ndarray | None:
        caches, start = self.own_caches(), self.length
        self._written = max(self._written, start + len(ids))
        if want is ALL:
            return caches.score(ids, start)
        if want is NOTHING:
            caches.prefill(ids, start)
            return None
        if want is HIDDEN:
            return caches.last(ids, start, HIDDEN_SIGNATURE)
        if isinstance(want, Rows):
            return self.engine.head_rows(caches.last(ids, start, HIDDEN_SIGNATURE), want.ids)
        return caches.last(ids, start, DECODE)

    def _rewind(self, length: int) -> bool:
        if not length:
            self._written = 0
            if self._holding.caches is not None and not self._holding.caches.is_finite:
                self._holding.take(None)  # they may hold what spoils the next conversation
            return True
        if SLIDING not in self.config.layer_types:
            return True
        ring = ring_positions(self.config, self.engine.context_length)
        return ring_reaches(self._written, length, ring, self.config.sliding_window)

    def _copy(self) -> Session:
        copy = LitertSession(self.engine, self.context_length)
        copy._written = self._written
        copy._holding.take(self._holding.caches)
        return copy


class _Holding:
    """What caches a session looks at, apart from it, so that they outlive it by a moment."""

    def __init__(self, engine: LitertEngine) -> None:
        self.caches: _Caches | None = None
        self._engine = weakref.ref(engine)

    def take(self, caches: _Caches | None) -> None:
        """Looks at these instead; those that nobody looks at any more go back to the engine."""
        before, self.caches = self.caches, caches
        if caches is not None:
            caches.users += 1
        if before is not None:
            before.users -= 1
            engine = self._engine()
            if engine is not None and not before.users and before.is_finite:
                engine.give_back(before)


class _Caches:
    """One conversation's key/value caches, and the calls that read tokens into them."""

    users = 0  # sessions that look at them: more than one while forks have not read on

    def __init__(self, engine: LitertEngine) -> None:
        # not the engine: an engine holds spare caches, and would never go
        self._runtime, self._config, self._info = engine.runtime, engine.config, engine.file.info
        # whether what was read last gave finite numbers, and so all that is held is finite: one
        # that is not, though masked, spoils whatever is computed beside it
        self.is_finite = True
        self._caches: dict[str, _CacheBuffer] = {}
        config, info = self._config, self._info
        for i in range(config.num_hidden_layers):
            positions = cache_positions(config, i, info.context_length)
            heads, width = config.num_key_value_heads, config.head_dim
            narrow = info.cache == "int8" and not config.is_sliding(i)
            for name, scale in zip(cache_names(i), cache_scale_names(i), strict=True):
                kind = np.int8 if narrow else np.float32
                self._add(name, (heads, positions, width), kind)
                if narrow:
                    self._add(scale, (heads, positions, 1), np.float32)
        self._buffers = {name: cache.buffer for name, cache in self._caches.items()}
        self._calls: dict[str, _Call] = {}

    def _add(self, name: str, shape: tuple[int, int, int], kind: Any) -> None:
        self._caches[name] = _CacheBuffer(self._runtime.model, name, shape, kind)

    def copy_from(self, other: _Caches, positions: int) -> None:
        """Takes over what `other` has written, which is no further than `positions`."""
        for name, cache in other._caches.items():
            self._caches[name].copy_from(cache, positions)

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
            signature = PREFILL.format(size) if size > 1 else HIDDEN_SIGNATURE
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
            call = _Call(self._runtime, self._config, signature, size, self._buffers)
            self._calls[signature] = call
        return self._calls[signature].run(ids, start)


class _CacheBuffer:
    """A key or value cache in the runtime's memory, or the scales of one. Zeros at first: what is
    masked is finite."""

    def __init__(self, model: Any, name: str, shape: tuple[int, int, int], kind: Any) -> None:
        self.buffer = model.create_input_buffer_by_name(DECODE, name)
        self._shape, self._kind = shape, kind  # [KV, positions, numbers a position]
        self.buffer.write(np.zeros(shape, kind))

    def copy_from(self, other: _CacheBuffer, positions: int) -> None:
        heads, room, width = self._shape
        if heads == 1:  # positions lie in a row: the first ones are all that was written
            count = min(positions, room) * width
            self.buffer.write(other.buffer.read(count, self._kind))
        else:
            self.buffer.write(other.buffer.read(heads * room * width, self._kind))


class _Call:
    """One signature bound to one conversation's caches."""

    def __init__(
        self, runtime: LitertRuntime, config: ModelConfig, signature: str, size: int,
        caches: dict[str, Any],
    ) -> None:  # fmt: skip
        self._runtime, self._signature, self._size = runtime, signature, size
        make = runtime.model.create_input_buffer_by_name
        self._tokens, self._positions = make(signature, TOKENS), make(signature, POSITIONS)
        self._inputs = {TOKENS: self._tokens, POSITIONS: self._positions, **caches}
        self._outputs = dict(caches)
        states = (config.num_hidden_layers + 2) * config.hidden_size
        results = {
            DECODE: (LOGITS, config.vocab_size),
            SCORE: (LOGITS, config.vocab_size),
            HIDDEN_SIGNATURE: (HIDDEN_STATE, config.hidden_size),
            TRACE.format(size): (HIDDEN_STATES, states),
        }
        name, self._width = results.get(signature, ("", 0))
        if name:
            self._result = runtime.model.create_output_buffer_by_name(signature, name)
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


def _suits(quantized: bool) -> int:
    if on_apple_silicon():
        return 3
    return 6 if quantized and not has_nvidia_gpu() else 3


BACKEND = Backend(
    name="litert",
    title="LiteRT",
    order=3,
    create=_create,
    modules=lambda: ("ai_edge_litert",),
    packages=("ai-edge-litert", "litert-lm-builder"),
    install="pip install 'gemma-multi[litert]'",
    precisions=("float32", "int4", "int8"),
    suits=_suits,
    runs=("tflite", "litertlm"),
    options=LitertOptions,
)
