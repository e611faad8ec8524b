"""MLX engine: mlx-lm's `gemma3_text` and its caches, on Apple silicon (and, slowly, Linux CPUs).

Design choices:
- Quantised weights stay packed and go to MLX as the checkpoint holds them. SFP8, which MLX cannot
  multiply, becomes the values that it stands for in the type of the activations.
- On a GPU activations are bfloat16, or float16 where the chip has no bfloat16. On a CPU they are
  float32, which MLX computes faster there.
- On a GPU texts are generated some steps at a time, with tokens chosen there (`mlx_ahead`).
- Sessions that are read together are rows of one batch (`mlx_batch`).
- Sliding layers keep their window and `SPARE` positions in a ring of our own (`mlx_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor, dense
from gemma_multi.engines.backend import Backend, Request, on_apple_silicon
from gemma_multi.engines.base import Engine, Session
from gemma_multi.engines.caches import SPARE, fitting, written_of
from gemma_multi.engines.mlx_ahead import STEPS, run_ahead
from gemma_multi.engines.mlx_batch import SideBySide
from gemma_multi.engines.mlx_cache import Ring
from gemma_multi.engines.mlx_model import (
    build_model,
    hidden_states,
    import_architecture,
    module_of,
    unpack_for_many_rows,
)
from gemma_multi.engines.precision import Prepared, prepare
from gemma_multi.engines.wants import ALL, HIDDEN, LAST, NOTHING, Chosen, Rows, Wanted
from gemma_multi.errors import BackendError
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor
from gemma_multi.transforms import DENSE

_PREFILL_CHUNK = 512  # tokens; bounds the memory of a long prompt's attention
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}
_WITHOUT_BFLOAT16 = ("applegpu_g13", "applegpu_g14")  # M1 and M2: no instructions for it


def _create(checkpoint: Checkpoint, request: Request) -> Engine:
    import mlx.core as mx

    return MlxEngine(mx, prepare(checkpoint, request, fast_type(mx)))


def fast_type(mx: ModuleType) -> str:
    """Of activations, on this device."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "float32"
    chip = str(mx.device_info().get("architecture", ""))
    return "float16" if chip.startswith(_WITHOUT_BFLOAT16) else "bfloat16"


class MlxEngine(Engine):
    name = "mlx"
    guesses_pay = True
    rows_at_a_time = 32

    def __init__(self, mx: ModuleType, prepared: Prepared) -> None:
        checkpoint, self.precision, self.compute = prepared
        super().__init__(checkpoint.config)
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.mx = mx
        if not on_gpu:
            mx.disable_compile()  # on a CPU it runs a C++ compiler for seconds, to fuse one gelu
        self.device = "gpu" if on_gpu else "cpu"
        self.model = self._build(checkpoint)
        self.steps_ahead = STEPS if on_gpu else 1
        self.whole_cache = import_architecture().KVCache  # of a global layer

    def _build(self, checkpoint: Checkpoint) -> Any:
        mx, config = self.mx, self.config
        model = build_model(config)
        quantized = {
            name.removesuffix(".weight"): tensor
            for name, tensor in checkpoint.tensors.items()
            if self.precision not in DENSE and isinstance(tensor, QuantizedTensor)
        }
        for stem, tensor in quantized.items():
            if tensor.group_size not in (32, 64, 128):
                raise BackendError(
                    f"backend 'mlx' has groups of 32, 64 or 128, but {stem!r} has groups of "
                    f"{tensor.group_size}; load it with precision='float32'"
                )
        if quantized:
            import mlx.nn as nn

            def settings(path: str, module: Any) -> Any:
                tensor = quantized.get(path)
                return tensor and {"group_size": tensor.group_size, "bits": tensor.bits}

            nn.quantize(model, class_predicate=settings)
            if self.device == "cpu":
                unpack_for_many_rows(model)
        for name in config.tensor_shapes():
            self._place(
                model, name, checkpoint.tensors[name], name.removesuffix(".weight") in quantized
            )
        mx.eval(model.parameters())
        return model

    def _assign(self, name: str, tensor: Tensor) -> None:
        self._place(self.model, name, tensor, "scales" in module_of(self.model, name))

    def _place(self, model: Any, name: str, tensor: Tensor, packed: bool) -> None:
        """Gives a layer its weight, packed if its module takes it so."""
        stem = name.removesuffix(".weight")
        if packed:
            assert isinstance(tensor, QuantizedTensor)
            module = module_of(model, name)  # made for the grid it was loaded with
            module.group_size, module.bits = tensor.group_size, tensor.bits
            # in bfloat16 compute MLX takes scales as they are stored and loses nothing; in float16,
            # which holds all of our grid's, it would go on in float32
            keep = self.compute == "bfloat16"
            weights = [
                (name, self.mx.array(np.ascontiguousarray(tensor.packed))),
                (f"{stem}.scales", self.as_array(tensor.scales, as_stored=keep)),
                (f"{stem}.biases", self.as_array(tensor.biases, as_stored=keep)),
            ]
        else:
            weights = [(name, self.as_array(dense(tensor)))]
        model.load_weights(weights, strict=False)

    def as_array(self, array: np.ndarray, as_stored: bool = False) -> Any:
        """A float array in the type of the activations, unless it is to stay as it is."""
        mx = self.mx
        if array.dtype == BFLOAT16:
            as_mlx = mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
        else:
            as_mlx = mx.array(np.ascontiguousarray(array))
        if not as_stored:
            as_mlx = as_mlx.astype(getattr(mx, self.compute))
        mx.eval(as_mlx)
        return as_mlx

    def weight(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        mx, module = self.mx, module_of(self.model, name)
        held = module.weight[rows]
        if "scales" in module:
            scales, biases = (module[n][rows].astype(mx.float32) for n in ("scales", "biases"))
            held = mx.dequantize(held, scales, biases, module.group_size, module.bits)
        elif held.ndim == 1:
            held = 1.0 + held  # as its RMSNorm does, in the same type
        return np.array(held.astype(mx.float32))

    def numpy(self, array: Any) -> np.ndarray:
        return np.array(array)

    def _read_together(
        self, sessions: Sequence[MlxSession], ids: Sequence[np.ndarray], wants: Sequence[Wanted]
    ) -> list[Any]:
        mx, rest = self.mx, []
        for session, row in zip(sessions, ids, strict=True):
            cut = max(0, len(row) - _PREFILL_CHUNK)
            if cut:  # all but its last chunk by itself
                session._reading(row[:cut], NOTHING)
            rest.append(row[cut:])
        counts = list(map(len, rest))
        tokens = np.stack([np.pad(row, (0, max(counts) - len(row))) for row in rest])
        hidden = hidden_states(self, tokens, [
            SideBySide(mx, list(of_layer), counts)
            for of_layer in zip(*(session.caches for session in sessions), strict=True)
        ])  # fmt: skip
        found = self.wanted_of(hidden[mx.arange(len(rest)), mx.array(counts) - 1], wants)
        results = [one for one in found if one is not None]
        mx.async_eval([session.arrays() for session in sessions], results)
        for session, row in zip(sessions, rest, strict=True):
            session._append(row)
        return found

    def _may_run_ahead(self, session: MlxSession, count: int) -> bool:
        return True

    def _run_ahead(
        self, sessions: Sequence[MlxSession], tokens: np.ndarray, wants: Sequence[Chosen]
    ) -> list[np.ndarray]:
        return run_ahead(self, sessions, tokens, wants)

    def wanted_of(self, hidden: Any, wants: Sequence[Wanted]) -> list[Any]:
        """What is wanted of each row of `[B, D]`."""
        whole = [i for i, want in enumerate(wants) if want is LAST]
        logits = iter(self.head(hidden[self.mx.array(whole)]) if whole else ())
        found: list[Any] = []
        for i, want in enumerate(wants):
            if want is LAST:
                found.append(next(logits))
            elif want is HIDDEN:
                found.append(hidden[i].astype(self.mx.float32))
            else:
                found.append(
                    self.head_rows(hidden[i], want.ids) if isinstance(want, Rows) else None
                )
        return found

    def head(self, hidden: Any) -> Any:
        """`[..., D]` -> the logits of the whole vocabulary, float32."""
        return self.model.model.embed_tokens.as_linear(hidden).astype(self.mx.float32)

    def head_rows(self, hidden: Any, ids: np.ndarray) -> Any:
        """`[D]` -> the logits of some tokens, float32: only their rows are multiplied."""
        mx, embedding, rows = self.mx, self.model.model.embed_tokens, self.mx.array(ids)
        weight = embedding.weight[rows]
        if "scales" in embedding:
            logits = mx.quantized_matmul(
                hidden[None], weight, embedding.scales[rows], embedding.biases[rows],
                transpose=True, group_size=embedding.group_size, bits=embedding.bits,
            )[0]  # fmt: skip
        else:
            logits = weight @ hidden
        return logits.astype(mx.float32)

    def _session(self, context_length: int) -> Session:
        return MlxSession(self, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        mx, model = self.mx, self.model.model
        session, layers, parts = MlxSession(self, len(ids)), model.layers, []
        try:
            for chunk in _chunks(ids):
                states: list[Any] = []
                model.layers = [_recorded(layer, states) for layer in layers]
                states.append(session.hidden(chunk))
                parts.append(np.array(mx.concatenate(states).astype(mx.float32)))
        finally:
            model.layers = layers
        return np.concatenate(parts, axis=1)


class MlxSession(Session):
    engine: MlxEngine

    def __init__(self, engine: MlxEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self.caches = self._new_caches()

    def _new_caches(self) -> list[Any]:
        config, mx = self.config, self.engine.mx
        whole = self.engine.whole_cache
        return [
            Ring(mx, config.sliding_window) if config.is_sliding(i) else whole()
            for i in range(config.num_hidden_layers)
        ]

    def _forward(self, ids: np.ndarray, want: Wanted) -> Any:
        engine, mx = self.engine, self.engine.mx
        parts, (*before, last) = [], _chunks(ids)
        for chunk in before:
            hidden = self.hidden(chunk)[0]
            if want is ALL:
                parts.append(engine.head(hidden))
            mx.eval(self.arrays(), parts)
        hidden = self.hidden(last)[0]
        if want is ALL:
            result = mx.concatenate([*parts, engine.head(hidden)])
        else:
            (result,) = engine.wanted_of(hidden[-1:], [want])
        # what is left for later can only be computed by this thread
        mx.async_eval(self.arrays(), [] if result is None else result)
        return result

    def arrays(self) -> list[Any]:
        return [cache.state[:2] for cache in self.caches]

    def hidden(self, ids: np.ndarray) -> Any:
        """One chunk, `i32[T]`, through the layers and the last norm: `[1, T, D]`."""
        return hidden_states(self.engine, ids[None], self.caches)

    def _rewind(self, length: int) -> bool:
        if not length:
            self.caches = self._new_caches()
            return True
        rings = [cache for cache in self.caches if isinstance(cache, Ring)]
        if not all(ring.reaches(length) for ring in rings):
            return False
        for one in self.caches:
            one.trim(self.length - length)
        return True

    def _held(self) -> dict[str, np.ndarray]:
        written = max(c.written if isinstance(c, Ring) else c.offset for c in self.caches)
        held = {"written": np.array([written], np.int32)}
        for i, cache in enumerate(self.caches):
            slots = written if isinstance(cache, Ring) else self.length
            for name, array in zip(("keys", "values"), cache.state, strict=False):
                kept = np.array(array[0, :, :slots].astype(self.engine.mx.float32))
                held[f"{i}.{name}"] = kept.astype(_STORED[self.engine.compute])
        return held

    def _restore(self, length: int, held: Mapping[str, np.ndarray]) -> bool:
        config = self.config
        written = written_of(held, length, self.context_length + SPARE)
        heads, width = config.num_key_value_heads, config.head_dim
        for i, cache in enumerate(self.caches):
            ring = isinstance(cache, Ring)
            slots = min(written, config.sliding_window + SPARE) if ring else length
            keys, values = (
                self.engine.as_array(fitting(held, f"{i}.{name}", (heads, slots, width))[None])
                for name in ("keys", "values")
            )
            if ring:
                cache.restore(keys, values, length, written)
            else:
                cache.state = (keys, values, length)
        return True

    def _copy(self) -> Session:
        copy = MlxSession(self.engine, self.context_length)
        for mine, theirs in zip(self.caches, copy.caches, strict=True):
            if isinstance(mine, Ring):
                theirs.copy_from(mine)
            elif self.length:
                keys, values, *rest = mine.state
                # a cache writes in place, through the array object: the copy needs its own
                theirs.state = (self.engine.mx.array(keys), self.engine.mx.array(values), *rest)
        self.engine.mx.async_eval(copy.arrays() if self.length else [])
        return copy


def _chunks(ids: np.ndarray) -> list[np.ndarray]:
    return [ids[i : i + _PREFILL_CHUNK] for i in range(0, len(ids), _PREFILL_CHUNK)]


def _recorded(layer: Callable[..., Any], states: list[Any]) -> Callable[..., Any]:
    """A layer that notes what it gives, and the first one also what it was given."""

    def run(x: Any, *rest: Any) -> Any:
        if not states:
            states.append(x)
        states.append(layer(x, *rest))
        return states[-1]

    return run


BACKEND = Backend(
    name="mlx",
    title="MLX",
    order=1,
    create=_create,
    modules=lambda: ("mlx.core", "mlx_lm"),
    packages=("mlx", "mlx-lm"),
    install="pip install 'gemma-multi[mlx]'",
    precisions=("float32", "bfloat16", "float16", "sfp8", "int4", "int8"),
    suits=lambda quantized: 9 if on_apple_silicon() else 1,
    trains=True,
    advice=lambda engine: "" if on_apple_silicon() else (
        "for checking only; MLX is fast on Apple silicon"
    ),
)  # fmt: skip
