"""Keras engine: keras-hub's Gemma3Backbone on JAX (or TensorFlow), for GPUs and CPUs.

Design choices:
- The backbone's layers are called one by one, with caches of our own (`keras_decoder`), and the
  head is applied only where logits are wanted: over a vocabulary of 262,144 the head of a
  prompt of 512 tokens would cost half a gigabyte.
- XLA compiles for fixed shapes: prompts are read in chunks of a few sizes.
- Sessions that are read together are rows of one batch (`keras_caches`). The head is a program of
  its own, so that what is wanted of a chunk does not compile the layers once more.
- On JAX tokens are chosen on the device, many steps in one program (`keras_ahead`); on GPUs that is
  how texts are generated.
- int4 and SFP8 weights become the values that they stand for in the compute type: at 270M
  unpacking every step would save memory and cost time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, dense
from gemma_multi.config import EMBEDDING, SLIDING
from gemma_multi.engines.backend import Backend, Request, has_nvidia_gpu, on_apple_silicon
from gemma_multi.engines.base import Engine, Session
from gemma_multi.engines.caches import SPARE, fitting, ring_reaches, written_of
from gemma_multi.engines.keras_ahead import STEPS, Ahead
from gemma_multi.engines.keras_backbone import build_backbone, import_keras, weight_slots
from gemma_multi.engines.keras_caches import Table, seat_together
from gemma_multi.engines.keras_decoder import Cache, run_layers
from gemma_multi.engines.keras_results import Chunks, Part, Shared
from gemma_multi.engines.keras_runtime import KerasRuntime
from gemma_multi.engines.precision import Prepared, prepare
from gemma_multi.engines.wants import ALL, HIDDEN, LAST, NOTHING, Chosen, Rows, Wanted

_CHUNKS = {512: 257, 128: 33, 16: 2, 1: 1}  # tokens -> from how many on padding is worth it
_TOGETHER = {128: 97, 32: 2, 1: 1}  # of many sessions, each of which is padded
_FEWEST_ROWS = 16  # of the head; more go in powers of two, so that few shapes are compiled
_MOST_ROWS = 4096  # of the head for several sessions; beyond, the whole of it is multiplied
_HIDDEN, _LOGITS, _STATES = "hidden", "logits", "states"  # what the program of a chunk gives


def _create(checkpoint: Checkpoint, request: Request) -> Engine:
    runtime = KerasRuntime(import_keras())
    return KerasEngine(runtime, prepare(checkpoint, request, runtime.fast))


class KerasEngine(Engine):
    name = "keras"
    rows_at_a_time = 32

    def __init__(self, runtime: KerasRuntime, prepared: Prepared) -> None:
        checkpoint, self.precision, self.compute = prepared
        super().__init__(checkpoint.config)
        self.runtime, self.device, self.gpu = runtime, runtime.device, runtime.gpu
        self.backbone = build_backbone(self.config, self.compute)
        self.slots = weight_slots(self.backbone, self.config)
        for name in self.slots:
            self._assign(name, checkpoint.tensors[name])
        self.compile()
        self.steps_ahead = STEPS if self.ahead is not None and self.device == "gpu" else 1
        self.reading_together = threading.RLock()

    def compile(self) -> None:
        """Makes the programs, each of which is compiled when it is first run."""
        compiled, variables = self.runtime.compile, self.backbone.variables
        self.forward = compiled(self._forward, variables, ("wanted", "fresh"), donated=(1,))
        self.head = compiled(self.head_of, variables)
        self.head_rows = compiled(self._head_rows, variables)
        self.ahead = Ahead(self) if self.runtime.on_jax else None

    def _assign(self, name: str, tensor: Tensor) -> None:
        slot = self.slots[name]
        value = self.runtime.array(dense(tensor), self.compute)
        slot.variable._value = self.runtime.as_value(slot.arrange(value), self.compute)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        super().assign(tensors)
        for program in (self.forward, self.head, self.head_rows):
            program.refresh()
        if self.ahead is not None:
            self.ahead.program.refresh()

    # What follows is traced by the framework: its arrays only.

    def _forward(
        self, ids: Any, caches: list[Cache], start: Any, count: Any, *, wanted: str, fresh: bool
    ) -> tuple[Any, list[Cache]]:
        """One chunk through the model, `i32[B, T]`, of which `count` are real: (what is wanted,
        caches). See `run_layers`."""
        from keras import ops

        x, states, written = run_layers(
            self.backbone, self.config, ids, caches, start, count, fresh
        )
        if wanted == _STATES:
            return ops.cast(ops.concatenate([*states, x]), "float32"), written
        if wanted == _LOGITS:
            logits = self.backbone.token_embedding(x, reverse=True)[0]
            return ops.cast(logits, "float32"), written
        rows, width, hidden = x.shape
        last = ops.maximum(count - 1, 0) + width * ops.arange(rows, dtype="int32")
        return ops.take(ops.reshape(x, (-1, hidden)), last, axis=0), written

    def head_of(self, hidden: Any) -> Any:
        """`[B, D]` -> the logits of the whole vocabulary, `f32[B, V]`."""
        from keras import ops

        return ops.cast(self.backbone.token_embedding(hidden, reverse=True), "float32")

    def _head_rows(self, hidden: Any, ids: Any) -> Any:
        """`[B, D]` -> the logits of some tokens, `f32[B, N]`: only their rows are multiplied."""
        from keras import ops

        weights = ops.take(self.backbone.token_embedding.embeddings, ids, axis=0)
        return ops.cast(ops.matmul(hidden, ops.transpose(ops.cast(weights, hidden.dtype))),
                        "float32")  # fmt: skip

    # Until here.

    def wanted_of(self, hidden: Any, wants: Sequence[Wanted]) -> list[Any]:
        """What is wanted of each row of `[B, D]`, the last norm's output."""
        if all(want is NOTHING for want in wants):
            return [None] * len(wants)
        every = [want.ids for want in wants if isinstance(want, Rows)]
        few = np.unique(np.concatenate(every)) if every else np.zeros(0, np.int64)
        if LAST in wants or len(few) > _MOST_ROWS:
            logits, ids = Shared(self.head(hidden)), None
        elif len(few):
            logits, ids = Shared(self.head_rows(hidden, _padded(few))), few
        states = Shared(hidden)
        found: list[Any] = []
        for row, want in enumerate(wants):
            if want is NOTHING:
                found.append(None)
            elif want is HIDDEN:
                found.append(Part(states, row))
            elif isinstance(want, Rows):
                at = want.ids if ids is None else np.searchsorted(ids, want.ids)
                found.append(Part(logits, row, at))
            else:
                found.append(Part(logits, row))
        return found

    def numpy(self, array: Any) -> np.ndarray:
        if isinstance(array, Part | Chunks):
            return array.numpy()
        return np.asarray(array)

    def _read_together(
        self, sessions: Sequence[KerasSession], ids: Sequence[np.ndarray], wants: Sequence[Wanted]
    ) -> list[Any]:
        """Sessions in one table, chunk by chunk, of which each row reads what it has left."""
        with self.reading_together:
            table = seat_together(self, sessions)
            hidden = self._last_states(table, sessions, ids)
            by_row: list[Wanted] = [NOTHING] * table.rows
            for session, want in zip(sessions, wants, strict=True):
                by_row[session.row] = want
            found = self.wanted_of(hidden, by_row)
            for session, row in zip(sessions, ids, strict=True):
                session._append(row)
            return [found[session.row] for session in sessions]

    def _may_run_ahead(self, session: KerasSession, count: int) -> bool:
        room = session.context_length - session.length - count + 1
        return self.ahead is not None and room >= STEPS

    def _run_ahead(
        self, sessions: Sequence[KerasSession], tokens: np.ndarray, wants: Sequence[Chosen]
    ) -> list[np.ndarray]:
        assert self.ahead is not None
        return self.ahead.read(sessions, tokens, wants)

    def _last_states(
        self, table: Table, sessions: Sequence[KerasSession], ids: Sequence[np.ndarray]
    ) -> Any:
        """Reads `ids` into the table; `[B, D]`, the last norm's output for the last of each."""
        given = {session.row: row for session, row in zip(sessions, ids, strict=True)}
        seated, longest = table.sessions(), max(map(len, ids))
        width = next(width for width, least in _TOGETHER.items() if longest >= least)
        begin = np.zeros(table.rows, np.int32)
        for row, session in seated.items():
            begin[row] = session.length
        table.reserve(int(begin.max()) + -(-longest // width) * width)
        fresh = width > 1 and not any(session.length for session in sessions)
        states = None
        for done in range(0, longest, width):
            tokens = np.zeros((table.rows, width), np.int32)
            count = np.zeros(table.rows, np.int32)
            for row, of in given.items():
                chunk = of[done : done + width]
                tokens[row, : len(chunk)], count[row] = chunk, len(chunk)
            start = begin + [min(done, len(given.get(row, ()))) for row in range(table.rows)]
            with table.giving_away():
                x, table.layers = self.forward(
                    tokens, table.layers, start.astype(np.int32), count, wanted=_HIDDEN,
                    fresh=fresh and not done,
                )  # fmt: skip
            states = x if states is None else self.runtime.where(count[:, None] > 0, x, states)
        for row, session in seated.items():
            # a row that read nothing has padding where its next token will be
            session.written = max(session.written, session.length + len(given.get(row, (0,))))
        return states

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


class KerasSession(Session):
    engine: KerasEngine

    def __init__(self, engine: KerasEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self.table: Table | None = None  # where it sits
        self.row = 0
        self.written = 0  # positions ever written since it was empty: what rings have lost

    def sit(self, table: Table | None, row: int = 0) -> None:
        if self.table is not None:
            self.table.users.discard(self)
        self.table, self.row = table, row
        if table is not None and table.rows == 1:
            table.users.add(self)

    def alone(self, positions: int) -> Table:
        """A table of its own, to be written."""
        if self.table is None:
            self.sit(Table.empty(self.engine, 1, positions))
        elif self.table.rows > 1:
            with self.engine.reading_together:
                self.sit(self.table.row(self.row))
        elif len(self.table.users) > 1:
            self.sit(self.table.copy())
        assert self.table is not None
        self.table.reserve(positions)
        return self.table

    def _forward(self, ids: np.ndarray, want: Wanted) -> Any:
        if want is ALL:
            return Chunks(list(self.read_chunks(ids, _LOGITS, _LOGITS)))
        *_, (hidden, _) = self.read_chunks(ids, _HIDDEN, _HIDDEN)
        return self.engine.wanted_of(hidden, [want])[0]

    def read_chunks(self, ids: np.ndarray, wanted: str, last: str) -> Iterator[tuple[Any, int]]:
        """(what is `wanted` of each chunk, and of the `last` one, with its padding; how many of
        its tokens are real)."""
        total, done = len(ids), 0
        while done < total:
            width = next(c for c, least in _CHUNKS.items() if total - done >= least)
            chunk = ids[done : done + width]
            start, count = self.length + done, len(chunk)
            table = self.alone(start + width)
            self.written = max(self.written, start + count)
            kind = last if done + count == total else wanted
            result, table.layers = self.engine.forward(
                np.pad(chunk, (0, width - count))[None], table.layers,
                np.array([start], np.int32), np.array([count], np.int32),
                wanted=kind, fresh=width > 1 and not start,
            )  # fmt: skip
            done += count
            yield result, count

    def _rewind(self, length: int) -> bool:
        if not length:
            self.sit(None)
            self.written = 0
            return True
        if SLIDING not in self.config.layer_types:
            return True
        window = self.config.sliding_window
        return ring_reaches(self.written, length, window + SPARE, window)

    def _held(self) -> dict[str, np.ndarray]:
        held = {"written": np.array([self.written], np.int32)}
        assert self.table is not None
        for i, cache in enumerate(self.table.row_layers(self.row)):
            for name, array in zip(("keys", "values"), cache, strict=True):
                held[f"{i}.{name}"] = np.array(array)[0, : self.written]
        return held

    def _restore(self, length: int, held: Mapping[str, np.ndarray]) -> bool:
        written = written_of(held, length, self.context_length + SPARE)
        table = Table.empty(self.engine, 1, written)
        layers = []
        for i, (keys, _) in enumerate(table.layers):
            _, positions, *rest = keys.shape
            kept, pair = min(positions, written), []
            for name in ("keys", "values"):
                full = np.zeros((1, positions, *rest), np.float32)  # the framework may look later
                full[0, :kept] = fitting(held, f"{i}.{name}", (kept, *rest))
                pair.append(self.engine.runtime.as_array(full, self.engine.compute))
            layers.append((pair[0], pair[1]))
        table.layers = layers
        self.sit(table)
        self.written = written
        return True

    def _copy(self) -> Session:
        copy = KerasSession(self.engine, self.context_length)
        if self.table is not None:
            with self.engine.reading_together:
                copy.sit(self.table if self.table.rows == 1 else self.table.row(self.row))
        copy.written = self.written
        return copy


def _padded(ids: np.ndarray) -> np.ndarray:
    size = max(_FEWEST_ROWS, 1 << (len(ids) - 1).bit_length())
    return np.pad(ids, (0, size - len(ids))).astype(np.int32)


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
    precisions=("float32", "bfloat16", "float16", "sfp8", "int4", "int8"),
    suits=_suits,
    trains=True,
    advice=_advice,
)
