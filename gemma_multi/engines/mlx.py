"""MLX engine: mlx-lm's `gemma3_text` and its caches, on Apple silicon (and, slowly, Linux CPUs).

Design choices:
- mlx-lm's package imports transformers and its own servers at import, several seconds. Only the
  architecture is wanted, so the two files that hold it are imported on their own.
- Quantised weights stay packed and go to MLX as the checkpoint holds them. On a CPU, whose packed
  kernels are twenty times slower than BLAS, a layer that is given many rows unpacks itself.
- On a GPU activations are bfloat16, or float16 where the chip has no bfloat16. On a CPU they are
  float32, which MLX computes faster there.
- Sliding layers keep their window and `SPARE` positions in a ring of our own (`mlx_cache`).
- mlx-lm's norms are given the config's eps and gain, by which the residual stream is carried at
  another scale.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.config import ModelConfig, alternate, round_scale
from gemma_multi.engines.backend import Backend, Request, on_apple_silicon
from gemma_multi.engines.base import ALL, HIDDEN, NOTHING, Engine, Rows, Session, Wanted
from gemma_multi.engines.mlx_cache import Ring
from gemma_multi.engines.precision import Prepared, prepare
from gemma_multi.errors import BackendError
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor
from gemma_multi.transforms import DENSE

_PREFILL_CHUNK = 512  # tokens; bounds the memory of a long prompt's attention
_MANY_ROWS = 8  # of activations, from which on unpacking a layer on a CPU pays
_HEAD_ROWS = 1 << 14  # of the embedding, unpacked together
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

    def __init__(self, mx: ModuleType, prepared: Prepared) -> None:
        checkpoint, self.precision, self.compute = prepared
        super().__init__(checkpoint.config)
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.mx = mx
        if not on_gpu:
            mx.disable_compile()  # on a CPU it runs a C++ compiler for seconds, to fuse one gelu
        self.device = "gpu" if on_gpu else "cpu"
        self.model = self._build(checkpoint)
        self.whole_cache = _import_architecture().KVCache  # of a global layer

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
                _unpack_for_many_rows(model)
        for name in config.tensor_shapes():
            self._place(
                model, name, checkpoint.tensors[name], name.removesuffix(".weight") in quantized
            )
        mx.eval(model.parameters())
        return model

    def _assign(self, name: str, tensor: Tensor) -> None:
        self._place(self.model, name, tensor, "scales" in _module(self.model, name))

    def _place(self, model: Any, name: str, tensor: Tensor, packed: bool) -> None:
        """Gives a layer its weight, packed if its module takes it so."""
        stem = name.removesuffix(".weight")
        if packed:
            assert isinstance(tensor, QuantizedTensor)
            module = _module(model, name)  # made for the grid it was loaded with
            module.group_size, module.bits = tensor.group_size, tensor.bits
            # in bfloat16 compute MLX takes scales as they are stored and loses nothing; in float16,
            # which holds all of our grid's, it would go on in float32
            keep = self.compute == "bfloat16"
            weights = [
                (name, self.mx.array(np.ascontiguousarray(tensor.packed))),
                (f"{stem}.scales", self._array(tensor.scales, as_stored=keep)),
                (f"{stem}.biases", self._array(tensor.biases, as_stored=keep)),
            ]
        else:
            dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
            weights = [(name, self._array(dense))]
        model.load_weights(weights, strict=False)

    def _array(self, array: np.ndarray, as_stored: bool = False) -> Any:
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
        mx, module = self.mx, _module(self.model, name)
        held = module.weight[rows]
        if "scales" in module:
            scales, biases = (module[n][rows].astype(mx.float32) for n in ("scales", "biases"))
            held = mx.dequantize(held, scales, biases, module.group_size, module.bits)
        elif held.ndim == 1:
            held = 1.0 + held  # as its RMSNorm does, in the same type
        return np.array(held.astype(mx.float32))

    def numpy(self, array: Any) -> np.ndarray:
        return np.array(array)

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


def _module(model: Any, name: str) -> Any:
    """The layer that holds a tensor."""
    for part in name.split(".")[:-1]:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def build_model(config: ModelConfig) -> Any:
    """mlx-lm's `gemma3_text` of this shape, with weights of its own making."""
    architecture = _import_architecture()
    factor = config.rope_scaling_factor
    arguments = architecture.ModelArgs(
        model_type="gemma3_text",
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        vocab_size=config.vocab_size,
        num_key_value_heads=config.num_key_value_heads,
        rope_theta=config.rope_theta,
        rope_local_base_freq=config.rope_local_theta,
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        sliding_window=config.sliding_window,
        sliding_window_pattern=_pattern(config.layer_types),
        max_position_embeddings=config.max_position_embeddings,
        rope_scaling=None if factor == 1 else {"rope_type": "linear", "factor": factor},
    )
    model = architecture.Model(arguments)
    model.sanitize({})  # ties the head to the embedding
    if config.residual_scale != 1:
        _carry_at_scale(model, config)
    return model


def _carry_at_scale(model: Any, config: ModelConfig) -> None:
    import mlx.core as mx

    class GainedRMSNorm(type(model.model.norm)):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            # in float32: a gain may be beyond what float16 holds, before it is made smaller
            gain = (1.0 + self.weight.astype(mx.float32)) * self.gain
            return mx.fast.rms_norm(x, gain.astype(x.dtype), self.eps)

    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            norm, gain = _module(model, name), config.norm_gain(name)
            norm.eps = config.norm_eps(name)
            if gain != 1:
                norm.__class__ = GainedRMSNorm
                norm.gain = gain


class MlxSession(Session):
    engine: MlxEngine

    def __init__(self, engine: MlxEngine, context_length: int) -> None:
        super().__init__(engine, context_length)
        self._caches = self._new_caches()
        # mlx-lm rounds the embedding scale to bfloat16 whatever the checkpoint was
        theirs = round_scale(engine.config.hidden_size**0.5, "bfloat16")
        self._rescale = engine.config.stream_scale / theirs

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
            mx.eval(self._arrays(), parts)
        hidden = self.hidden(last)[0]
        result = None
        if want is ALL:
            result = mx.concatenate([*parts, engine.head(hidden)])
        elif want is HIDDEN:
            result = hidden[-1].astype(mx.float32)
        elif isinstance(want, Rows):
            result = engine.head_rows(hidden[-1], want.ids)
        elif want is not NOTHING:
            result = engine.head(hidden[-1:])[0]
        # what is left for later can only be computed by this thread
        mx.async_eval(self._arrays(), [] if result is None else result)
        return result

    def _arrays(self) -> list[Any]:
        return [cache.state[:2] for cache in self._caches]

    def hidden(self, ids: np.ndarray) -> Any:
        """One chunk, `i32[T]`, through the layers and the last norm: `[1, T, D]`, MLX's array."""
        model = self.engine.model.model
        tokens, embedded = self.engine.mx.array(ids[None]), None
        if self._rescale != 1.0:
            embedded = model.embed_tokens(tokens) * self._rescale
        # gemma3_text looks at cache[pattern - 1] even when the model has fewer layers
        missing = model.sliding_window_pattern - len(self._caches)
        caches = self._caches + [self._caches[0]] * missing
        return model(tokens, cache=caches, input_embeddings=embedded)

    def _rewind(self, length: int) -> bool:
        if not length:
            self._caches = self._new_caches()
            return True
        rings = [cache for cache in self._caches if isinstance(cache, Ring)]
        if not all(ring.reaches(length) for ring in rings):
            return False
        for one in self._caches:
            one.trim(self.length - length)
        return True

    def _copy(self) -> Session:
        copy = MlxSession(self.engine, self.context_length)
        for mine, theirs in zip(self._caches, copy._caches, strict=True):
            if isinstance(mine, Ring):
                theirs.copy_from(mine)
            elif self.length:
                keys, values, *rest = mine.state
                # a cache writes in place, through the array object: the copy needs its own
                theirs.state = (self.engine.mx.array(keys), self.engine.mx.array(values), *rest)
        self.engine.mx.async_eval(copy._arrays() if self.length else [])
        return copy


def _unpack_for_many_rows(model: Any) -> None:
    import mlx.core as mx
    import mlx.nn as nn

    def product(module: Any, x: Any, rows: slice = slice(None)) -> Any:
        scales, biases = (module[name][rows].astype(x.dtype) for name in ("scales", "biases"))
        packed = module.weight[rows]
        return x @ mx.dequantize(packed, scales, biases, module.group_size, module.bits).T

    class UnpackingLinear(nn.QuantizedLinear):
        def __call__(self, x: Any) -> Any:
            if x.size // x.shape[-1] < _MANY_ROWS:
                return super().__call__(x)
            return product(self, x)

    class UnpackingEmbedding(nn.QuantizedEmbedding):
        def as_linear(self, x: Any) -> Any:
            if x.size // x.shape[-1] < _MANY_ROWS:
                return super().as_linear(x)
            starts = range(0, self.weight.shape[0], _HEAD_ROWS)  # whole, it would be 671 MB
            parts = [product(self, x, slice(start, start + _HEAD_ROWS)) for start in starts]
            return mx.concatenate(parts, axis=-1)

    unpacking = {nn.QuantizedLinear: UnpackingLinear, nn.QuantizedEmbedding: UnpackingEmbedding}
    for _, module in model.named_modules():
        module.__class__ = unpacking.get(type(module), type(module))


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


def _pattern(layer_types: tuple[str, ...]) -> int:
    """mlx-lm places a global layer every `pattern` layers; Gemma's own pattern is 6."""
    layers = len(layer_types)
    for pattern in (6, *range(1, layers + 2)):
        if alternate(layers, pattern) == layer_types:
            return pattern
    raise BackendError(
        f"backend 'mlx' needs a global layer at regular distances, received {list(layer_types)}"
    )


@cache
def _import_architecture() -> ModuleType:
    """`mlx_lm.models.gemma3_text` without running `mlx_lm/__init__.py`."""
    if "mlx_lm" in sys.modules:
        return importlib.import_module("mlx_lm.models.gemma3_text")
    spec = importlib.util.find_spec("mlx_lm")
    bare = ModuleType("mlx_lm")
    bare.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules["mlx_lm"] = bare
    try:
        return importlib.import_module("mlx_lm.models.gemma3_text")
    finally:
        # a later `import mlx_lm` must find nothing half-made
        for name in [n for n in sys.modules if n == "mlx_lm" or n.startswith("mlx_lm.")]:
            del sys.modules[name]


BACKEND = Backend(
    name="mlx",
    title="MLX",
    order=1,
    create=_create,
    modules=lambda: ("mlx.core", "mlx_lm"),
    packages=("mlx", "mlx-lm"),
    install="pip install 'gemma-multi[mlx]'",
    precisions=("float32", "bfloat16", "float16", "int4", "int8"),
    suits=lambda quantized: 9 if on_apple_silicon() else 1,
    trains=True,
    advice=lambda engine: "" if on_apple_silicon() else (
        "for checking only; MLX is fast on Apple silicon"
    ),
)  # fmt: skip
