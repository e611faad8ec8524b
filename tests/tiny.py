"""Small random Gemma 3 models: the true architecture, a fraction of a second to run."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import ModelConfig, alternate
from gemma_multi.sources import BUNDLED, open_checkpoint
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.transforms import to_precision

STORYTELLER = BUNDLED["storyteller"]


@cache
def tokenizer() -> Tokenizer:
    """The storyteller's; its 4,096 pieces serve the tiny models too."""
    return Tokenizer.from_directory(STORYTELLER)


def tiny_config(**changes: Any) -> ModelConfig:
    """Eight layers, one of them global; hidden size no perfect square; a window of 16."""
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 96,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "sliding_window": 16,
        "max_position_embeddings": 256,
        "query_pre_attn_scalar": 32.0,
        "dtype": "float32",
    }
    values.update(changes)
    values.setdefault("layer_types", alternate(values["num_hidden_layers"], 6))
    return ModelConfig(**values)


def gemma_270m_config() -> ModelConfig:
    """The real one's shape."""
    return tiny_config(
        vocab_size=262144, hidden_size=640, num_hidden_layers=18, head_dim=256,
        intermediate_size=2048, sliding_window=512, dtype="bfloat16", query_pre_attn_scalar=256.0,
        max_position_embeddings=32768,
    )  # fmt: skip


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights that keep activations near one, norms away from zero; float32."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        scale = 0.2 if len(shape) == 1 else shape[-1] ** -0.5
        tensors[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return tensors


def random_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    return Checkpoint(config, random_tensors(config, seed), make_tokenizer=tokenizer)  # type: ignore[arg-type]


def tiny_checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    return random_checkpoint(tiny_config(**changes), seed)


LOUD = "model.layers.3.post_feedforward_layernorm.weight"


def loud_checkpoint(by: float = 20_000.0, vocab_size: int = 4096) -> Checkpoint:
    """One whose fourth layer adds large numbers to the stream, as the real ones do."""
    quiet = tiny_checkpoint(vocab_size=vocab_size)
    return quiet.with_tensors({LOUD: quiet.weight(LOUD) + np.float32(by)})


def noisy_storyteller() -> Checkpoint:
    """The storyteller as it may have been before it was put on its grid, in float32."""
    dense = to_precision(open_checkpoint("storyteller"), "float32")
    rng = np.random.default_rng(1)
    noisy = {
        name: dense.weight(name) * rng.normal(1, 0.08, shape).astype(np.float32)
        for name, shape in dense.config.tensor_shapes().items() if len(shape) == 2
    }  # fmt: skip
    return dense.with_tensors(noisy)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    data = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            data.pop(name, None)
        else:
            data[name] = value
    path.write_text(json.dumps(data))
