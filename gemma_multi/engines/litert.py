"""LiteRT engine: the file that ships to phones, run here, on CPUs and by its GPU delegate.

Design choices:
- What runs is an exported file: one that was given, or one exported from a checkpoint into the
  user's cache, once (`litert_files`).
- A conversation's caches are 23 MB at 4,096 positions, and making them takes longer than reading
  a token. Those of conversations that have ended are used again as they are: what is masked only
  has to be finite. A fork shares its origin's until one of the two reads on, and then copies what
  was read, not the room behind it.
- A ring that is full cannot go back further than its spare positions: what it overwrote is gone.
  The session says so (`_rewind`), and the tokens that stay are read again.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, dense
from gemma_multi.config import EMBEDDING, SLIDING
from gemma_multi.engines.ahead import part
from gemma_multi.engines.backend import Backend, Request, has_nvidia_gpu, on_apple_silicon
from gemma_multi.engines.base import Array, Engine, Session
from gemma_multi.engines.caches import ring_reaches, written_of
from gemma_multi.engines.litert_caches import BatchCalls, Caches
from gemma_multi.engines.litert_files import passing_file, ready_file
from gemma_multi.engines.litert_runtime import LitertRuntime, Place
from gemma_multi.engines.wants import ALL, HIDDEN, LAST, NOTHING, Rows, Wanted
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.exporters import tflite
from gemma_multi.formats.tflite.file import TfliteFile
from gemma_multi.formats.tflite.layout import (
    DECODE,
    TOKENS,
    batch_sizes,
    ring_positions,
)
from gemma_multi.formats.tflite.layout import HIDDEN as HIDDEN_SIGNATURE
from gemma_multi.machine import available_cores
from gemma_multi.options import option
from gemma_multi.transforms import fit_float16

_MOST_THREADS = 1024
_MOST_SPARE = 4  # conversations whose caches are kept when they end
_HEAD_BYTES = 1 << 26  # of the rows of the head that are kept for sets of token ids


@dataclass(frozen=True)
class LitertOptions:
    threads: int | None = option(None, "Processor cores to use; all there are if unset.")
    device: str = option("cpu", "cpu, or gpu: LiteRT's GPU delegate.")
    enforce_f32: bool = option(False, "Compute in float32 on a GPU that has float16.")
    prefill_precision: str = option(
        "same", "int8: read prompts with int8 rows beside int4 layers: quicker on CPUs, for 100 MB "
        "of a 270M."
    )  # fmt: skip
    decode_batch: int = option(
        1, "Conversations whose next tokens are read in one call, for servers: 2, 4 or 8."
    )

    def __post_init__(self) -> None:
        if self.device not in tflite.TARGETS:
            raise OptionError(f"device is {self.device!r}, expected {' or '.join(tflite.TARGETS)}")
        if self.enforce_f32 and self.device == "cpu":
            raise OptionError("enforce_f32 is for device 'gpu'; CPUs compute in float32")
        tflite.check_ways_of_reading(self.prefill_precision, self.decode_batch)
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
        _check_gpu(file, place.enforce_f32)
    return LitertEngine(file, place)


def _check_gpu(file: TfliteFile, in_float32: bool) -> None:
    """Raises BackendError for a file that a GPU would not run, or not right."""
    again = "export the model again with target='gpu'"
    if file.info.precision == "int4":
        raise BackendError(
            f"{file.path} holds int4 in blocks, on which LiteRT's GPU delegate ends the process; "
            f"{again}"
        )
    if file.info.target != "gpu" and not in_float32:
        raise BackendError(
            f"{file.path} was exported for CPUs, and computes what float16 does not hold; {again}, "
            "or load it with enforce_f32=True"
        )


class LitertEngine(Engine):
    name = "litert"
    fixed_weights = True
    guesses_pay = True

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
        self.rows_at_a_time = file.info.decode_batch
        digest = "" if passing else file.digest
        self.runtime = LitertRuntime(file.path, digest, place, (DECODE, TOKENS))
        self.gpu = self.runtime.gpu
        self._batches = BatchCalls(self.runtime, self.config)
        self._spare: list[Caches] = []
        # the rows of the head for a set of token ids, as they would be multiplied
        self._heads: dict[bytes, np.ndarray] = {}

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        if len(self.config.tensor_shapes()[name]) == 1:
            return self.file.gain(name)
        return dense(self.file.read(name, rows)).astype(np.float32, copy=False)

    def head_rows(self, hidden: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """`f32[D]` -> the logits of some tokens, from exact weights and activations."""
        key = ids.tobytes()
        head = self._heads.get(key)
        if head is None:
            head = dense(self.file.read(EMBEDDING, ids)).astype(np.float32, copy=False)
            kept = sum(other.nbytes for other in self._heads.values())
            if kept + head.nbytes > _HEAD_BYTES:
                self._heads.clear()
            if head.nbytes <= _HEAD_BYTES:
                self._heads[key] = head
        logits: np.ndarray = head @ hidden
        return logits

    def borrow(self) -> Caches:
        """Caches for one conversation; what they hold is somebody's past, and never seen."""
        try:
            return self._spare.pop()
        except IndexError:
            return Caches(self.runtime, self.config, self.file.info)

    def give_back(self, caches: Caches) -> None:
        if len(self._spare) < _MOST_SPARE:
            self._spare.append(caches)

    def _read_together(
        self, sessions: Sequence[Any], ids: Sequence[np.ndarray], wants: Sequence[Wanted]
    ) -> list[Array | None]:
        """Those that read a token and want its logits, in batches; a prompt fills a call alone."""
        found: dict[int, Array | None] = {}
        alike = [i for i, row in enumerate(ids) if len(row) == 1 and wants[i] is LAST]
        for size in reversed(batch_sizes(self.rows_at_a_time)):
            while len(alike) >= size:
                places, alike = alike[:size], alike[size:]
                logits = self._read_batch(part(sessions, places), part(ids, places))
                found |= dict(zip(places, logits, strict=True))
        for i, session in enumerate(sessions):
            if i not in found:
                found[i] = session._reading(ids[i], wants[i])
        return [found[i] for i in range(len(sessions))]

    def _read_batch(self, sessions: Sequence[LitertSession], ids: Sequence[np.ndarray]) -> Array:
        """The logits of one token of each: `f32[N, V]`."""
        starts = [session.length for session in sessions]
        caches = [session.caches_for(1) for session in sessions]
        logits = self._batches.read(caches, np.concatenate(ids), np.array(starts, np.int32))
        for session, row in zip(sessions, ids, strict=True):
            session._append(row)
        return logits

    def _session(self, context_length: int) -> Session:
        return LitertSession(self, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        states = self._tracing.borrow().trace(ids)
        layers = self.config.num_hidden_layers + 2
        return states.reshape(len(states), layers, -1).transpose(1, 0, 2)

    @functools.cached_property
    def _tracing(self) -> LitertEngine:
        """This engine over the same tensors in a file that also gives the hidden states."""
        info = self.file.info
        options = tflite.TfliteOptions(
            info.context_length, info.prefill, info.precision, info.cache, info.target,
            info.prefill_precision,
        )  # fmt: skip
        built = tflite.build(self.file.checkpoint("tflite"), options, trace=True)
        file = passing_file(f"{self.file.digest[:32]}.trace", built.write)
        return LitertEngine(file, self.place, passing=True)


class LitertSession(Session):
    engine: LitertEngine

    def __init__(self, engine: LitertEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self._written = 0  # positions ever written since it was empty: what rings have lost
        self._holding = _Holding(engine)
        # back to the engine when nobody holds this session any more
        weakref.finalize(self, self._holding.take, None)

    def own_caches(self) -> Caches:
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

    def caches_for(self, count: int) -> Caches:
        """This session's own, into which so many tokens are about to be read."""
        caches = self.own_caches()
        self._written = max(self._written, self.length + count)
        return caches

    def _forward(self, ids: np.ndarray, want: Wanted) -> np.ndarray | None:
        caches, start = self.caches_for(len(ids)), self.length
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

    def _held(self) -> dict[str, np.ndarray]:
        caches = self._holding.caches
        assert caches is not None
        return {"written": np.array([self._written], np.int32), **caches.held(self._written)}

    def _restore(self, length: int, held: Mapping[str, np.ndarray]) -> bool:
        written = written_of(held, length, self.context_length)
        self.own_caches().restore(held, written)
        self._written = written
        return True

    def _copy(self) -> Session:
        copy = LitertSession(self.engine, self.context_length)
        copy._written = self._written
        copy._holding.take(self._holding.caches)
        return copy


_COUNTING = threading.RLock()  # a session may be let go of while another is counted


class _Holding:
    """What caches a session looks at, apart from it, so that they outlive it by a moment."""

    def __init__(self, engine: LitertEngine) -> None:
        self.caches: Caches | None = None
        self._engine = weakref.ref(engine)

    def take(self, caches: Caches | None) -> None:
        """Looks at these instead; those that nobody looks at any more go back to the engine."""
        with _COUNTING:
            before, self.caches = self.caches, caches
            if caches is not None:
                caches.users += 1
            if before is not None:
                before.users -= 1
        if before is not None:
            engine = self._engine()
            if engine is not None and not before.users and before.is_finite:
                engine.give_back(before)


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
