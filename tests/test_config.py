"""config.json in both layouts, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_config

from gemma_multi.config import FULL, SLIDING, ModelConfig, alternate
from gemma_multi.errors import ConfigError

# google/gemma-3-270m's config.json as transformers 4 wrote it
LAYOUT_4: dict[str, Any] = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": list(alternate(18, 6)),
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
LAYOUT_5 = {
    **{k: v for k, v in LAYOUT_4.items() if not k.startswith(("rope_", "torch_", "_sliding"))},
    "dtype": "bfloat16",
    "rope_parameters": {
        FULL: {"rope_theta": 1000000.0, "rope_type": "default"},
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
}


@pytest.mark.parametrize("data", [LAYOUT_4, LAYOUT_5], ids=["transformers 4", "transformers 5"])
def test_270m_in_either_layout(data: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(data)
    assert config.num_parameters == 268_098_176
    assert config.num_embedding_parameters == 167_772_160
    assert config.embedding_scale == 25.25
    assert [i for i in range(18) if not config.is_sliding(i)] == [5, 11, 17]
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.query_scale == 256**-0.5
    assert config == ModelConfig.from_dict(LAYOUT_4)


def test_1b_and_the_scaled_rope_of_larger_ones() -> None:
    one_b = {**LAYOUT_4, "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912,
             "layer_types": None, "sliding_window_pattern": 6}  # fmt: skip
    config = ModelConfig.from_dict(one_b)
    assert config.num_parameters == 999_885_952
    assert config.embedding_scale == 34.0
    four_b = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}  # fmt: skip
    config = ModelConfig.from_dict(four_b)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 4)
    assert config.rope_scaling_factor == 8.0
    assert config.max_position_embeddings == 131072
    assert config.eos_token_ids == (1, 106)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_embedding_scale_follows_the_original_type(dtype: str) -> None:
    expected = {"float32": 25.298221588134766, "bfloat16": 25.25, "float16": 25.296875}
    assert (
        ModelConfig.from_dict({**LAYOUT_4, "torch_dtype": dtype}).embedding_scale
        == (expected[dtype])
    )


def test_what_is_written_is_read_back_by_us_and_by_transformers() -> None:
    from transformers import Gemma3TextConfig

    for config in (tiny_config(), tiny_config(rope_scaling_factor=8.0, dtype="bfloat16"),
                   tiny_config(layer_types=(SLIDING, FULL) * 4)):  # fmt: skip
        data = config.to_dict()
        assert ModelConfig.from_dict(data) == config
        theirs = Gemma3TextConfig(**data)
        assert list(theirs.layer_types) == list(config.layer_types)
        assert theirs.rope_parameters[SLIDING]["rope_theta"] == config.rope_local_theta
        # and transformers' own spelling of it comes back as the same model
        assert ModelConfig.from_dict(theirs.to_dict()) == config


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "head_dim", "vocab_size",
                                   "num_attention_heads", "num_key_value_heads",
                                   "intermediate_size", "sliding_window"])  # fmt: skip
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} is missing"):
        ModelConfig.from_dict({k: v for k, v in LAYOUT_4.items() if k != field})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"hidden_size": "640"}, "hidden_size is '640', expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 18 layers"),
        ({"layer_types": [FULL] * 18}, "layer_types contradicts sliding_window_pattern 6"),
        ({"layer_types": ["chunked"] * 18}, "layer_types is"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 255}, "head_dim is 255"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is"),
        ({"rope_parameters": {FULL: {}}}, "no 'sliding_attention' entry"),
        ({"rope_parameters": LAYOUT_5["rope_parameters"], "rope_theta": 5e5}, "which is it"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        (
            {
                "rope_parameters": LAYOUT_5["rope_parameters"],
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            r"rope_scaling is.*which is it",
        ),
        ({"dtype": "float32"}, "torch_dtype 'bfloat16': which is it"),
        ({"eos_token_id": [1, 10**9]}, "eos_token_id has 1000000000"),
        ({"model_type": "gemma3"}, "it has no text_config"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
        ({"bos_token_id": 300000}, "bos_token_id is 300000"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
    ],
)
def test_a_contradiction_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**LAYOUT_4, **change})
