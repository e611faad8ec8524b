"""Logits against Hugging Face transformers, kept in `goldens/logits.npz` by `goldens/make.py`."""

from __future__ import annotations

import numpy as np
import pytest
from engines.conftest import BACKENDS
from goldens.make import CASES, FILE, token_ids
from tiny import random_tensors

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import create_engine


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(backend: str, case: str) -> None:
    config = CASES[case]
    engine = create_engine(Checkpoint(config, random_tensors(config)), backend, "float32")
    ids = token_ids(config)
    expected = np.load(FILE)[case]
    session = engine.session(batch=2)
    read = session.score(ids[:, :50])
    stepped = np.stack([session.step(ids[:, i]) for i in range(50, ids.shape[1])], axis=1)
    actual = np.concatenate([read, stepped], axis=1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


def test_the_goldens_would_show_a_wrong_embedding_scale(backend: str) -> None:
    """The trap that frameworks disagree on: sqrt(hidden) rounded to bfloat16, or not."""
    config = CASES["bfloat16 embedding scale"]
    wrong = config.replace(embedding_scale=config.hidden_size**0.5)
    engine = create_engine(Checkpoint(wrong, random_tensors(wrong)), backend, "float32")
    logits = engine.session(batch=2).score(token_ids(wrong))
    assert np.abs(logits - np.load(FILE)["bfloat16 embedding scale"]).max() > 2e-3


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_models_with_fewer_layers_than_the_pattern_run_alike(layers: int) -> None:
    """mlx-lm alone fails on these: it looks for the first global layer's cache."""
    from tiny import tiny_checkpoint

    checkpoint = tiny_checkpoint(num_hidden_layers=layers)
    ids = np.random.default_rng(0).integers(4, 320, (1, 30))
    mlx, *others = (create_engine(checkpoint, b, "float32") for b in BACKENDS)
    expected = mlx.session().score(ids)
    for other in others:
        np.testing.assert_allclose(other.session().score(ids), expected, rtol=0, atol=2e-4)
