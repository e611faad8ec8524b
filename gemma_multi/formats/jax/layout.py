"""How google-deepmind/gemma names its parameters, how they lie, and what its models compute.

Design choices:
- `places` is the one table of where each of our tensors is: a leaf of the tree, and of some leaves
  one half (keys and values, gate and up), which lie one behind the other along the first axis.
- A checkpoint of the library says nothing but its tree. Beside those we write lies a config.json;
  of others the shapes say most, and the rest (the window, the rope's scaling, the query's scale) is
  that of the published model of this size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import CheckpointError, ConfigError
from gemma_multi.formats.heads import Arrange, split_in, split_out

EPS = 1e-6  # a constant of the library's
NORMS = {  # by the names of Hugging Face, and of the library
    "input_layernorm": "pre_attention_norm",
    "self_attn.q_norm": "attn/_query_norm",
    "self_attn.k_norm": "attn/_key_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PICTURES = ("vision_encoder/", "embedder/mm_", "SigLiPFromPatches_0/")  # passed over
_PERIOD = 6  # every sixth layer is global
_TABLE, _LAYER = "embedder/input_embedding", re.compile(r"layer_(\d+)/")


@dataclass(frozen=True)
class LeafPlace:
    """Where the library keeps a tensor, and how it lies there."""

    leaf: str  # the names of the tree on the way to it, with slashes
    whole: tuple[int, ...]  # the leaf's shape
    arrange: Arrange  # from Hugging Face's layout to the library's
    restore: Arrange  # and back
    part: int | None = None  # of the leaf, along its first axis; None: all of it


def places(config: ModelConfig) -> dict[str, LeafPlace]:
    """Every tensor's place by its Hugging Face name."""
    h, d, f = config.hidden_size, config.head_dim, config.intermediate_size
    n, kv = config.num_attention_heads, config.num_key_value_heads

    def as_is(leaf: str, *whole: int, part: int | None = None) -> LeafPlace:
        return LeafPlace(leaf, whole, lambda w: w, lambda v: v, part)

    def by_heads(leaf: str, part: int | None, count: int, *whole: int) -> LeafPlace:
        return LeafPlace(f"attn/{leaf}/w", whole, *split_in(count, h, d), part)

    if n == kv:
        attention = {
            f"self_attn.{name}_proj": by_heads("qkv_einsum", i, n, 3, n, h, d)
            for i, name in enumerate("qkv")
        }
    else:
        attention = {
            "self_attn.q_proj": by_heads("q_einsum", None, n, n, h, d),
            "self_attn.k_proj": by_heads("kv_einsum", 0, kv, 2, kv, h, d),
            "self_attn.v_proj": by_heads("kv_einsum", 1, kv, 2, kv, h, d),
        }
    layer = {
        **attention,
        "self_attn.o_proj": LeafPlace("attn/attn_vec_einsum/w", (n, d, h), *split_out(n, h, d)),
        "mlp.gate_proj": as_is("mlp/gating_einsum", 2, f, h, part=0),
        "mlp.up_proj": as_is("mlp/gating_einsum", 2, f, h, part=1),
        "mlp.down_proj": LeafPlace("mlp/linear", (f, h), lambda w: w.T, lambda v: v.T),
        **{name: as_is(f"{norm}/scale", d if norm.startswith("attn/") else h)
           for name, norm in NORMS.items()},
    }  # fmt: skip
    found = {
        EMBEDDING: as_is(_TABLE, config.vocab_size, h),
        "model.norm.weight": as_is("final_norm/scale", h),
    }
    for i in range(config.num_hidden_layers):
        for name, place in layer.items():
            found[f"model.layers.{i}.{name}.weight"] = LeafPlace(
                f"layer_{i}/{place.leaf}", place.whole, place.arrange, place.restore, place.part
            )
    return found


# (hidden size, layers) -> what the shapes do not say, of Gemma 3 in 270M, 1B, 4B, 12B and 27B
_SMALL: dict[str, Any] = {"sliding_window": 512, "max_position_embeddings": 32768}
_LARGE: dict[str, Any] = {
    "sliding_window": 1024, "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
_PUBLISHED: dict[tuple[int, int], dict[str, Any]] = {
    (640, 18): _SMALL, (1152, 26): _SMALL, (2560, 34): _LARGE, (3840, 48): _LARGE,
    (5376, 62): {**_LARGE, "query_pre_attn_scalar": 168},
}  # fmt: skip


def config_of(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The config of a tree that came without one. Raises CheckpointError, ConfigError."""
    layers = 1 + max((int(m[1]) for name in shapes if (m := _LAYER.match(name))), default=-1)

    def shape(leaf: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(leaf)
        if found is None or len(found) != rank:
            what = "is missing" if found is None else f"has shape {list(found)}"
            raise CheckpointError(
                f"{path}: {leaf!r} {what}, expected google-deepmind/gemma's parameters of a "
                f"Gemma 3 model, with {rank} axes here; its gm.ckpts.save_params writes them"
            )
        return found

    vocabulary, hidden = shape(_TABLE, 2)
    gating = shape("layer_0/mlp/gating_einsum", 3)
    apart = "layer_0/attn/qkv_einsum/w" not in shapes
    heads, _, dim = shape("layer_0/attn/q_einsum/w", 3) if apart else shape(
        "layer_0/attn/qkv_einsum/w", 4)[1:]  # fmt: skip
    rest = _PUBLISHED.get((hidden, layers))
    if rest is None:
        raise CheckpointError(
            f"{path}: {layers} layers of {hidden} are none of the published Gemma 3 models, and "
            "no config.json lies beside them to say the window and the rope's bases"
        )
    try:
        return ModelConfig.from_dict({
            "model_type": "gemma3_text",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shape("layer_0/attn/kv_einsum/w", 4)[1] if apart else heads,
            "head_dim": dim,
            "intermediate_size": gating[1],
            "sliding_window_pattern": _PERIOD,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "query_pre_attn_scalar": dim,
            "rms_norm_eps": EPS,
            "dtype": "bfloat16",
            **rest,
        })  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
