"""What llama.cpp calls the parts of a Gemma 3: metadata keys, tensors, and what it leaves out.

Norms are stored as what activations are multiplied by, `1 + w`; Hugging Face and this package keep
`w`. The layer pattern, the rope base of the sliding layers and the query scale are llama.cpp's own
code for this architecture, unless the file says otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING, FULL, SLIDING, ModelConfig, alternate
from gemma_multi.errors import CheckpointError, ConfigError
from gemma_multi.formats.gguf.file import GgufFile

ARCHITECTURE = "gemma3"
_PATTERN = "attention.sliding_window_pattern"  # a period, or a list of flags
TOKENS, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
TOKENIZER_MODEL = "tokenizer.ggml.model"
HEAD = "output.weight"  # only where it is not tied
_LAYERS_OF_27B = 62  # whose query scale is of another kind
_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def stored_name(name: str) -> str:
    """GGUF's name of a tensor: `model.layers.0.mlp.up_proj.weight` is `blk.0.ffn_up.weight`."""
    if name == EMBEDDING:
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_MODULES[module]}.weight"


def read_config(file: GgufFile) -> ModelConfig:
    """The config that the metadata say. Raises CheckpointError for another architecture,
    ConfigError for a value that cannot be."""
    data = file.metadata
    architecture = data.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: is a {architecture!r} model, expected {ARCHITECTURE!r} (a Gemma 3 text "
            "model)"
        )
    if (parts := str(data.get("split.count", 0))) not in ("0", "1"):
        raise CheckpointError(
            f"{file.path}: is one of {parts} parts; join them with llama-gguf-split --merge"
        )
    stored = file.tensors.get(stored_name(EMBEDDING))
    if stored is None or len(stored.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor {stored_name(EMBEDDING)!r} is missing")

    def value(key: str, default: Any = None) -> Any:
        found = data.get(f"{ARCHITECTURE}.{key}", default)
        if found is not None and not isinstance(found, int | float | str) and key != _PATTERN:
            raise ConfigError(f"{file.path}: {key} is a list, expected one value")
        return found

    layers, hidden = value("block_count"), value("embedding_length")
    width, heads = value("attention.key_length", 256), value("attention.head_count")
    if value("attention.value_length", width) != width:
        raise ConfigError(
            f"{file.path}: attention.value_length is {value('attention.value_length')!r}, but "
            f"key_length {width!r}; Gemma 3 has one head width"
        )
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value(cap):
            raise ConfigError(f"{file.path}: {cap} is {value(cap)!r}, but Gemma 3 has none")
    scalar = width
    if layers == _LAYERS_OF_27B and type(hidden) is type(heads) is int and heads:
        scalar = hidden / heads
    factor = value("rope.scaling.factor")
    scaling = value("rope.scaling.type", "linear" if factor else "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(
            f"{file.path}: rope.scaling.type is {scaling!r}; Gemma 3 has 'none' or 'linear'"
        )
    try:
        return ModelConfig.from_dict({
            "model_type": "gemma3_text",
            "vocab_size": stored.shape[0],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": width,
            "intermediate_size": value("feed_forward_length"),
            "sliding_window": value("attention.sliding_window"),
            "layer_types": _layer_types(value(_PATTERN), layers),
            "max_position_embeddings": value("context_length"),
            "rope_theta": value("rope.freq_base", 1e6),
            "rope_local_base_freq": value("rope.freq_base_swa", 1e4),
            "rope_scaling": {"rope_type": "linear", "factor": factor}
            if factor and scaling == "linear" else None,
            "query_pre_attn_scalar": scalar,
            "rms_norm_eps": _shortest(value("attention.layer_norm_rms_epsilon", 1e-6)),
            **{f"{name}_token_id": data[f"tokenizer.ggml.{key}_token_id"]
               for name, key in (("bos", "bos"), ("pad", "padding"))
               if f"tokenizer.ggml.{key}_token_id" in data},
        })  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _layer_types(pattern: Any, layers: Any) -> list[str] | None:
    """From a period, or a flag for each layer that says whether it slides; None: Gemma's."""
    if pattern is None or type(layers) is not int or not 0 < layers <= 1024:
        return None
    if type(pattern) is int and pattern > 0:
        return list(alternate(layers, pattern))
    try:
        flags = [bool(flag) for flag in pattern]
    except TypeError:
        return None
    return [SLIDING if flag else FULL for flag in flags]


def _shortest(value: Any) -> Any:
    """A float32 as people write it: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
