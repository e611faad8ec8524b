"""What llama.cpp calls the parts of a Gemma 3: metadata keys, tensors, and what it leaves out.

Norms are stored as what activations are multiplied by, `1 + w`; Hugging Face and this package keep
`w`. The layer pattern, the rope base of the sliding layers and the query scale are llama.cpp's own
code for this architecture, unless the file says otherwise. What a checkpoint holds and GGUF has no
key for is in keys of our own, which other programs pass over.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING, FULL, SLIDING, ModelConfig, alternate
from gemma_multi.errors import CheckpointError, ConfigError
from gemma_multi.formats.gguf.file import GgufFile

ARCHITECTURE = "gemma3"
PATTERN = "attention.sliding_window_pattern"  # a period, or a list of flags
GEMMA_PERIOD, LOCAL_ROPE_BASE = 6, 1e4  # where the file does not say
TOKENS, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
TOKENIZER_MODEL = "tokenizer.ggml.model"
REPOSITORY = "general.source.huggingface.repository"
CHAT_TEMPLATE = "tokenizer.chat_template"
RESERVED = "<unused"  # how pieces begin that are for nothing yet
PAD_PIECE = "[PAD"  # how pieces are called that make as many as the embedding has rows
HEAD = "output.weight"  # only where it is not tied
# ours
CONFIG = "gemma_multi.config"  # JSON: the fields of `OWN_FIELDS`
OWN_FIELDS = ("dtype", "embedding_scale", "residual_scale", "eos_token_id")
PROVENANCE = "gemma_multi.provenance"  # JSON: where the weights are from, and every modification
GENERATION = "gemma_multi.generation"  # JSON: generation_config.json
NOTICE = "gemma_multi.notice"  # for people
NORMS = "gemma_multi.norms"  # bytes of all norms, where `1 + w` does not give every `w` back
NORM_TYPES = "gemma_multi.norm_types"  # and what each is stored as
# how what a checkpoint holds is called in a file
KIND_OF = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
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


def query_scalar(layers: int, hidden: int, heads: int, width: int) -> int:
    """What llama.cpp divides queries by the root of: no key says another."""
    return hidden // heads if layers == _LAYERS_OF_27B else width


def read_own(file: GgufFile, key: str) -> dict[str, Any]:
    """The JSON object of one of our keys, empty where there is none. Raises CheckpointError."""
    text = file.metadata.get(key, "{}")
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file.path}: {key} is no JSON object; export the file again")
    return found


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
        if found is not None and not isinstance(found, int | float | str) and key != PATTERN:
            raise ConfigError(f"{file.path}: {key} is a list, expected one value")
        return _shortest(found)

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
    if type(hidden) is type(heads) is int and heads > 0:
        scalar = query_scalar(layers, hidden, heads, width)
    factor = value("rope.scaling.factor")
    scaling = value("rope.scaling.type", "linear" if factor else "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(
            f"{file.path}: rope.scaling.type is {scaling!r}; Gemma 3 has 'none' or 'linear'"
        )
    window, pattern = value("attention.sliding_window"), value(PATTERN)
    if window == 0:  # no layer slides
        window, pattern = value("context_length"), 1
    own = read_own(file, CONFIG)
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
            "sliding_window": window,
            "layer_types": _layer_types(pattern, layers),
            "max_position_embeddings": value("context_length"),
            "rope_theta": value("rope.freq_base", 1e6),
            "rope_local_base_freq": value("rope.freq_base_swa", LOCAL_ROPE_BASE),
            "rope_scaling": {"rope_type": "linear", "factor": factor}
            if factor and scaling == "linear" else None,
            "query_pre_attn_scalar": scalar,
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
            **{f"{name}_token_id": data[f"tokenizer.ggml.{key}_token_id"]
               for name, key in (("bos", "bos"), ("pad", "padding"))
               if f"tokenizer.ggml.{key}_token_id" in data},
            **{name: own[name] for name in OWN_FIELDS if name in own},
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
    """A float32 as people write it: 1e-6, not 9.999999974752427e-07. (Others as they are.)"""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))
