"""ModelConfig: the shape of a Gemma 3 text model, read from `config.json`.

Design choices:
- One frozen dataclass with the field names of Hugging Face, the field's common tongue. What the
  file spells in several ways (rope bases, the layer pattern) has one spelling here.
- Both layouts are read: transformers 4 (`rope_theta`, `rope_local_base_freq`,
  `sliding_window_pattern`) and transformers 5 (`rope_parameters` by layer type). Where a file
  says a thing twice, the two must agree.
- A field with no safe default is required and its absence is named. A feature that the engines
  do not compute (soft caps, biases, two-way attention) is refused, never ignored.
- The embedding scale is data, not code: `sqrt(hidden_size)` rounded as the original weights'
  type rounds it. Frameworks disagree here, and at hidden size 640 it moves logits by 0.025.
- So is the residual scale. Gemma 3's residual stream passes float16's 65,504, but every layer
  reads it through a norm and adds to it through a norm, so an engine may carry it at a power of
  two of its size: what enters is multiplied by it (`stream_scale`, `norm_gain`), and so is, twice,
  what the norms that read it add to the power (`norm_eps`). Weights stay as they are, and in
  float32 so does every bit of the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.errors import ConfigError, OptionError

_BFLOAT16_STEP = 2.0**-8  # how far it may round a number, relatively
SLIDING, FULL = "sliding_attention", "full_attention"
EMBEDDING = "model.embed_tokens.weight"
# our own entry in config.json, where `dtype` has to be what is stored
TRAINED_DTYPE = "trained_dtype"

# What transformers' Gemma3TextConfig assumes; the `text_config` of a vision model relies on it.
_VISION_TEXT_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
# norms that read the residual stream, and norms whose result is added to it
READ_STREAM = ("input_layernorm", "pre_feedforward_layernorm", "model.norm")
_ADD_TO_STREAM = ("post_attention_layernorm", "post_feedforward_layernorm")
# field -> the only values the engines compute
_ONLY = {
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "hidden_act": (None, "gelu_pytorch_tanh"),
    "attention_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Gemma 3 text model. Sizes are counts; rope bases are in the units of theta."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    max_position_embeddings: int = 32768
    rope_theta: float = 1_000_000.0  # global layers
    rope_local_theta: float = 10_000.0  # sliding layers
    rope_scaling_factor: float = 1.0  # linear, global layers only (4B and up)
    query_pre_attn_scalar: float = 256.0
    rms_norm_eps: float = 1e-6
    dtype: str = "bfloat16"  # of the original weights
    embedding_scale: float = 0.0  # 0 means: derive it from hidden_size and dtype
    residual_scale: float = 1.0  # a power of two: of its size, the residual stream is carried at
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1, 106)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if not self.embedding_scale:
            object.__setattr__(
                self, "embedding_scale", round_scale(self.hidden_size**0.5, self.dtype)
            )
        _check(self)

    @property
    def query_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5

    @property
    def is_scaled_by_root(self) -> bool:
        """Whether the embedding scale is the root of the hidden size, as far as bfloat16 tells:
        what runtimes multiply by that take no other."""
        return abs(self.embedding_scale / self.hidden_size**0.5 - 1) <= _BFLOAT16_STEP

    @property
    def stream_scale(self) -> float:
        """What an embedded token is multiplied by as it enters the residual stream."""
        return self.embedding_scale * self.residual_scale

    def norm_gain(self, name: str) -> float:
        """What the tensor `name`, a norm's, is multiplied by as `1 + w`."""
        return self.residual_scale if _module(name) in _ADD_TO_STREAM else 1.0

    def norm_eps(self, name: str) -> float:
        """What the norm of the tensor `name` adds to its input's power."""
        scale = self.residual_scale if _module(name) in READ_STREAM else 1.0
        return self.rms_norm_eps * scale**2

    @property
    def num_embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its Hugging Face name, `[out, in]` for linear layers."""
        h, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, h)}
        for i in range(self.num_hidden_layers):
            for name, shape in {
                "input_layernorm": (h,),
                "self_attn.q_proj": (q, h),
                "self_attn.k_proj": (kv, h),
                "self_attn.v_proj": (kv, h),
                "self_attn.o_proj": (h, q),
                "self_attn.q_norm": (d,),
                "self_attn.k_norm": (d,),
                "post_attention_layernorm": (h,),
                "pre_feedforward_layernorm": (h,),
                "mlp.gate_proj": (f, h),
                "mlp.up_proj": (f, h),
                "mlp.down_proj": (h, f),
                "post_feedforward_layernorm": (h,),
            }.items():
                shapes[f"model.layers.{i}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (h,)
        return shapes

    def replace(self, **changes: Any) -> ModelConfig:
        return replace(self, **changes)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads a `config.json`. Raises ConfigError naming the file and the field."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: not found; a model directory needs a config.json") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON: {error}") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Any) -> ModelConfig:
        """Reads either layout of config.json; a vision model's `text_config` stands for it."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"expected a JSON object, received {type(data).__name__}")
        raw = _text_part(data)
        for field, allowed in _ONLY.items():
            if raw.get(field) not in allowed:
                raise ConfigError(
                    f"{field} is {raw[field]!r}, but a Gemma 3 text model has {allowed[-1]!r}"
                )
        layers = _integer(raw, "num_hidden_layers", most=1024)
        rope_global, rope_local, factor = _rope(raw)
        hidden = _integer(raw, "hidden_size")
        stated = {str(raw[k]).split(".")[-1] for k in ("dtype", "torch_dtype") if raw.get(k)}
        if len(stated) > 1:
            raise ConfigError(
                f"dtype is {raw['dtype']!r}, but torch_dtype {raw['torch_dtype']!r}: which is it?"
            )
        dtype = str(raw.get(TRAINED_DTYPE) or (stated.pop() if stated else "bfloat16"))
        eos = raw.get("eos_token_id", (1, 106))
        eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in eos_ids):
            raise ConfigError(f"eos_token_id is {eos!r}, expected a token id or a list of them")
        return cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=_integer(raw, "num_attention_heads"),
            num_key_value_heads=_integer(raw, "num_key_value_heads"),
            head_dim=_integer(raw, "head_dim"),
            intermediate_size=_integer(raw, "intermediate_size"),
            sliding_window=_integer(raw, "sliding_window"),
            layer_types=_layer_types(raw, layers),
            max_position_embeddings=_integer(raw, "max_position_embeddings", 32768),
            rope_theta=rope_global,
            rope_local_theta=rope_local,
            rope_scaling_factor=factor,
            query_pre_attn_scalar=_number(raw, "query_pre_attn_scalar", 256.0),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            dtype=dtype,
            embedding_scale=_number(raw, "embedding_scale", round_scale(hidden**0.5, dtype)),
            residual_scale=_number(raw, "residual_scale", 1.0),
            bos_token_id=_integer(raw, "bos_token_id", 2, least=0),
            eos_token_ids=eos_ids,
            pad_token_id=_integer(raw, "pad_token_id", 0, least=0),
        )

    def to_dict(self) -> dict[str, Any]:
        """A `config.json` that transformers 4 and 5, mlx-lm and llama.cpp's converter all read."""
        pattern = _regular_pattern(self.layer_types)
        scaling = (
            {"rope_type": "linear", "factor": self.rope_scaling_factor}
            if self.rope_scaling_factor != 1.0
            else None
        )
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": self.sliding_window,
            "layer_types": list(self.layer_types),
            **({"sliding_window_pattern": pattern} if pattern else {}),
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_local_base_freq": self.rope_local_theta,
            "rope_scaling": scaling,
            "rope_parameters": {
                FULL: {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
                SLIDING: {"rope_theta": self.rope_local_theta, "rope_type": "default"},
            },
            "query_pre_attn_scalar": _plain(self.query_pre_attn_scalar),
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            "embedding_scale": self.embedding_scale,
            **({"residual_scale": self.residual_scale} if self.residual_scale != 1 else {}),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


def _module(name: str) -> str:
    """The module of a norm's tensor: "input_layernorm", in any layer, or "model.norm"."""
    stem = name.removesuffix(".weight")
    return stem if stem == "model.norm" else stem.rsplit(".", 1)[-1]


def round_scale(value: float, dtype: str) -> float:
    """`value` as a number of type `dtype` holds it: 25.298 is 25.25 in bfloat16."""
    if dtype == "bfloat16":
        bits = np.float32(value).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return float(np.uint32(rounded << np.uint64(16)).view(np.float32))
    return float(np.float16(value) if dtype == "float16" else np.float32(value))


def check_context_length(asked: int | None, longest: int) -> int:
    """Positions as asked for, or the longest there are. Raises OptionError."""
    length = longest if asked is None else asked
    if type(length) is not int or not 1 <= length <= longest:
        raise OptionError(f"context_length is {length!r}, expected 1 to {longest}")
    return length


def alternate(num_layers: int, pattern: int) -> tuple[str, ...]:
    """Layer types where every `pattern`-th layer is global, as in every released Gemma 3 (6)."""
    return tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(num_layers))


def _regular_pattern(layer_types: tuple[str, ...]) -> int | None:
    """The period that explains `layer_types`, or None. Without a global layer it is Gemma's 6."""
    period = layer_types.index(FULL) + 1 if FULL in layer_types else max(6, len(layer_types) + 1)
    return period if alternate(len(layer_types), period) == layer_types else None


def _text_part(data: Mapping[str, Any]) -> dict[str, Any]:
    kind = data.get("model_type")
    if kind == "gemma3" and not isinstance(data.get("text_config"), Mapping):
        raise ConfigError("model_type is 'gemma3', a vision model, but it has no text_config")
    if kind == "gemma3":
        outer = {k: data[k] for k in ("torch_dtype", "dtype", "eos_token_id") if k in data}
        return {**_VISION_TEXT_DEFAULTS, **outer, **data["text_config"]}
    if kind != "gemma3_text":
        raise ConfigError(f"model_type is {kind!r}, expected 'gemma3_text' or 'gemma3'")
    return dict(data)


def _rope(raw: Mapping[str, Any]) -> tuple[float, float, float]:
    """(global theta, local theta, global linear scaling factor) from either layout."""
    parameters = raw.get("rope_parameters")
    scaling = raw.get("rope_scaling")
    if parameters is None:
        theta = _number(raw, "rope_theta", 1e6)
        local = _number(raw, "rope_local_base_freq", 1e4)
    else:
        for kind in (FULL, SLIDING):
            if not isinstance(parameters, Mapping) or not isinstance(parameters.get(kind), Mapping):
                raise ConfigError(f"rope_parameters has no {kind!r} entry")
        full, sliding = parameters[FULL], parameters[SLIDING]
        theta = _number(full, "rope_theta", 1e6, where="rope_parameters.full_attention.")
        local = _number(sliding, "rope_theta", 1e4, where="rope_parameters.sliding_attention.")
        if sliding.get("rope_type", "default") != "default":
            raise ConfigError("rope_parameters.sliding_attention must have rope_type 'default'")
        for field, value in (("rope_theta", theta), ("rope_local_base_freq", local)):
            if raw.get(field) is not None and raw[field] != value:
                raise ConfigError(
                    f"{field} is {raw[field]!r}, but rope_parameters says {value!r}: which is it?"
                )
        if isinstance(scaling, Mapping):
            theirs = (scaling.get("rope_type", scaling.get("type")), scaling.get("factor"))
            if theirs != (full.get("rope_type", "default"), full.get("factor")):
                raise ConfigError(
                    f"rope_scaling is {scaling!r}, but rope_parameters says {dict(full)!r}: "
                    "which is it?"
                )
        scaling = full
    if scaling is None:
        return theta, local, 1.0
    shape = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else None
    if shape == "default":
        return theta, local, 1.0
    if shape != "linear":
        raise ConfigError(f"rope_scaling is {scaling!r}; Gemma 3 uses 'linear' or none")
    return theta, local, _number(scaling, "factor", where="rope_scaling.")


def _layer_types(raw: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern"))
    by_pattern = alternate(layers, _integer({"sliding_window_pattern": pattern or 6},
                                            "sliding_window_pattern"))  # fmt: skip
    types = raw.get("layer_types")
    if types is None:
        return by_pattern
    if not isinstance(types, list) or not all(t in (SLIDING, FULL) for t in types):
        raise ConfigError(f"layer_types is {types!r}, expected a list of {SLIDING!r} and {FULL!r}")
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries for {layers} layers")
    if pattern is not None and tuple(types) != by_pattern:
        raise ConfigError(f"layer_types contradicts sliding_window_pattern {pattern}")
    return tuple(types)


def _integer(
    raw: Mapping[str, Any], name: str, default: int | None = None, *, least: int = 1,
    most: int = 1 << 31,
) -> int:  # fmt: skip
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
    return value


def _number(
    raw: Mapping[str, Any], name: str, default: float | None = None, *, where: str = ""
) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"{where}{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}{name} is {value!r}, expected a number")
    if not 0 < value <= 1e300:  # also for Python's whole numbers, which know no infinity
        raise ConfigError(f"{where}{name} is {value!r}, expected a number above zero")
    return float(value)


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _check(config: ModelConfig) -> None:
    """What no single field can show: that the fields fit together."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    if config.head_dim % 2:
        raise ConfigError(f"head_dim is {config.head_dim}, but rotary positions need an even one")
    if math.frexp(config.residual_scale)[0] != 0.5 or not 2**-24 <= config.residual_scale <= 2**24:
        raise ConfigError(
            f"residual_scale is {config.residual_scale!r}, expected a power of two from 2**-24 to "
            "2**24"
        )
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype is {config.dtype!r}, expected 'bfloat16', 'float16' or 'float32'")
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise ConfigError(
                f"eos_token_id has {token}, but the vocabulary has {config.vocab_size} tokens"
            )
    for field in fields(config):
        if field.name.endswith("_token_id"):
            value = getattr(config, field.name)
            if value >= config.vocab_size:
                raise ConfigError(
                    f"{field.name} is {value}, but the vocabulary has {config.vocab_size} tokens"
                )
