"""MLX engine: mlx-lm's `gemma3_text` and its caches, on Apple silicon (and, slowly, Linux CPUs).

Design choices:
- mlx-lm's package imports transformers and its own servers at import, several seconds. Only the
  architecture is wanted, so the two files that hold it are imported on their own.
- Quantised weights stay packed and go to MLX as the checkpoint holds them. On a CPU, whose packed
  kernels are twenty times slower than BLAS, a layer that is given many rows unpacks itself.
- On a GPU activations are bfloat16. On a CPU they are float32, which MLX computes faster there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.checkpoint import Tensor
from gemma_multi.config import ModelConfig, alternate, round_scale
from gemma_multi.engines.base import Engine, Session, choose_precision
from gemma_multi.errors import BackendError
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor

_PREFILL_CHUNK = 512  # tokens; bounds the memory of a long prompt's attention
_MANY_ROWS = 8  # of activations, from which on unpacking a layer on a CPU pays
_HEAD_ROWS = 1 << 14  # words whose embedding is unpacked together


def create(checkpoint: Checkpoint, precision: str) -> Engine:
    import mlx.core as mx

    return MlxEngine(mx, checkpoint, precision)


class MlxEngine(Engine):
    name = "mlx"

    def __init__(self, mx: ModuleType, checkpoint: Checkpoint, precision: str) -> None:
        super().__init__(checkpoint.config)
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self.mx = mx
        if not on_gpu:
            mx.disable_compile()  # on a CPU it runs a C++ compiler for seconds, to fuse one gelu
        self.device = "gpu" if on_gpu else "cpu"
        fast = "bfloat16" if on_gpu else "float32"
        checkpoint, self.precision, self.compute = choose_precision(checkpoint, precision, fast)
        self.model = self._build(checkpoint)

    def _build(self, checkpoint: Checkpoint) -> Any:
        mx, config = self.mx, self.config
        model = build_model(config)
        quantized = {
            name.removesuffix(".weight"): tensor
            for name, tensor in checkpoint.tensors.items()
            if self.precision not in ("float32", "bfloat16") and isinstance(tensor, QuantizedTensor)
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
            weights = [
                (name, self.mx.array(np.ascontiguousarray(tensor.packed))),
                # in bfloat16 compute MLX takes scales as they are stored and loses nothing
                (f"{stem}.scales", self._array(tensor.scales, widen_only=True)),
                (f"{stem}.biases", self._array(tensor.biases, widen_only=True)),
            ]
        else:
            dense = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
            weights = [(name, self._array(dense))]
        model.load_weights(weights, strict=False)

    def _array(self, array: np.ndarray, widen_only: bool = False) -> Any:
        """A float array in the type of the activations (or kept, where that would round it)."""
        mx = self.mx
        if array.dtype == BFLOAT16:
            as_mlx = mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
        else:
            as_mlx = mx.array(np.ascontiguousarray(array))
        if self.compute == "float32" or not widen_only:
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

    def _session(self, batch: int, context_length: int) -> Session:
        return MlxSession(self, batch, context_length)

    def _trace(self, ids: np.ndarray) -> np.ndarray:
        mx, model = self.mx, self.model.model
        session, layers, parts = MlxSession(self, 1, ids.shape[1]), model.layers, []
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
    return model


class MlxSession(Session):
    def __init__(self, engine: MlxEngine, batch: int, context_length: int) -> None:
        super().__init__(engine.config, batch, context_length)
        self._engine = engine
        self._caches = self._new_caches()
        # mlx-lm rounds the embedding scale to bfloat16 whatever the checkpoint was
        theirs = round_scale(engine.config.hidden_size**0.5, "bfloat16")
        self._rescale = engine.config.embedding_scale / theirs

    def _new_caches(self) -> list[Any]:
        caches = self._engine.model.make_cache()
        # gemma3_text looks at cache[pattern - 1] even when the model has fewer layers
        pattern = self._engine.model.args.sliding_window_pattern
        return caches + [caches[0]] * (pattern - len(caches))

    def _forward(self, ids: np.ndarray, every: bool) -> np.ndarray:
        mx, model = self._engine.mx, self._engine.model
        parts = []
        *before, last = _chunks(ids)
        for chunk in (*before, last):
            hidden = self.hidden(chunk)
            if every or chunk is last:
                wanted = hidden if every else hidden[:, -1:]
                logits = model.model.embed_tokens.as_linear(wanted).astype(mx.float32)
                parts.append(np.array(logits))
            else:
                mx.eval([cache.state[:2] for cache in self._caches])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def hidden(self, ids: np.ndarray) -> Any:
        """One chunk through the layers and the last norm: `[B, T, D]`, an MLX array."""
        model = self._engine.model.model
        tokens, embedded = self._engine.mx.array(ids), None
        if self._rescale != 1.0:
            embedded = model.embed_tokens(tokens) * self._rescale
        return model(tokens, cache=self._caches, input_embeddings=embedded)

    def _rewind(self, length: int) -> bool:
        if not length:
            self._caches = self._new_caches()
            return True
        layers = self._caches[: self.config.num_hidden_layers]
        if not all(cache.is_trimmable() for cache in layers):
            return False
        for cache in layers:
            cache.trim(self.length - length)
        return True

    def _copy(self) -> Session:
        copy = MlxSession(self._engine, self.batch, self.context_length)
        for mine, theirs in zip(self._caches, copy._caches, strict=True):
            keys, values, *rest = mine.state
            if keys is not None:
                # caches write in place, through the array object: the copy needs its own
                theirs.state = (self._engine.mx.array(keys), self._engine.mx.array(values), *rest)
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
    return [ids[:, i : i + _PREFILL_CHUNK] for i in range(0, ids.shape[1], _PREFILL_CHUNK)]


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
