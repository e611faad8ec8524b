"""mlx-lm's `gemma3_text`: imported lightly, built to a config, and taught what it lacks.

- mlx-lm's package imports transformers and its own servers at import, several seconds. Only the
  architecture is wanted, so the two files that hold it are imported on their own.
- mlx-lm's norms are given the config's eps and gain, by which the residual stream is carried at
  another scale.
- On a CPU, whose packed kernels are twenty times slower than BLAS, a layer that is given many rows
  unpacks itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma_multi.config import ModelConfig, alternate, round_scale
from gemma_multi.errors import BackendError

if TYPE_CHECKING:
    from gemma_multi.engines.mlx import MlxEngine

_MANY_ROWS = 8  # of activations, from which on unpacking a layer on a CPU pays
_HEAD_ROWS = 1 << 14  # of the embedding, unpacked together


def build_model(config: ModelConfig) -> Any:
    """mlx-lm's `gemma3_text` of this shape, with weights of its own making."""
    architecture = import_architecture()
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
            norm, gain = module_of(model, name), config.norm_gain(name)
            norm.eps = config.norm_eps(name)
            if gain != 1:
                norm.__class__ = GainedRMSNorm
                norm.gain = gain


def unpack_for_many_rows(model: Any) -> None:
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


def hidden_states(engine: MlxEngine, ids: Any, caches: list[Any]) -> Any:
    """`i32[B, T]`, of NumPy or MLX, through the layers and the last norm: `[B, T, D]` of MLX."""
    model, config = engine.model.model, engine.config
    tokens, embedded = engine.mx.array(ids), None
    # mlx-lm rounds the embedding scale to bfloat16 whatever the checkpoint was
    rescale = config.stream_scale / round_scale(config.hidden_size**0.5, "bfloat16")
    if rescale != 1.0:
        embedded = model.embed_tokens(tokens) * rescale
    # gemma3_text looks at cache[pattern - 1] even when the model has fewer layers
    missing = model.sliding_window_pattern - len(caches)
    return model(tokens, cache=caches + [caches[0]] * missing, input_embeddings=embedded)


def module_of(model: Any, name: str) -> Any:
    """The layer that holds a tensor."""
    for part in name.split(".")[:-1]:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


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
def import_architecture() -> ModuleType:
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
