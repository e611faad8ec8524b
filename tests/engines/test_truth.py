"""Logits against Hugging Face transformers, kept in `goldens/logits.npz` by `goldens/make.py`."""

from __future__ import annotations

import numpy as np
import pytest
from engines.conftest import BACKENDS
from goldens.make import CASES, FILE, token_ids
from tiny import random_checkpoint

from gemma_multi.engines import ALL, create_engine


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(backend: str, case: str) -> None:
    config = CASES[case]
    engine = create_engine(random_checkpoint(config), backend, "float32")
    ids = token_ids(config)
    expected = np.load(FILE)[case]
    for row, logits in zip(ids, expected, strict=True):
        session = engine.session()
        read = session.read(row[:50], ALL)
        stepped = np.stack([session.read([token]) for token in row[50:]])
        actual = np.concatenate([read, stepped])
        np.testing.assert_allclose(actual, logits, rtol=0, atol=2e-4)


def test_the_goldens_would_show_a_wrong_embedding_scale(backend: str) -> None:
    """The trap that frameworks disagree on: sqrt(hidden) rounded to bfloat16, or not."""
    config = CASES["bfloat16 embedding scale"]
    wrong = config.replace(embedding_scale=config.hidden_size**0.5)
    engine = create_engine(random_checkpoint(wrong), backend, "float32")
    logits = engine.session().read(token_ids(wrong)[0], ALL)
    assert np.abs(logits - np.load(FILE)["bfloat16 embedding scale"][0]).max() > 2e-3


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_models_with_fewer_layers_than_the_pattern_run_alike(layers: int) -> None:
    """mlx-lm alone fails on these: it looks for the first global layer's cache."""
    from tiny import tiny_checkpoint

    checkpoint = tiny_checkpoint(num_hidden_layers=layers)
    ids = np.random.default_rng(0).integers(4, 320, 30)
    mlx, *others = (create_engine(checkpoint, b, "float32") for b in BACKENDS)
    expected = mlx.session().read(ids, ALL)
    for other in others:
        np.testing.assert_allclose(other.session().read(ids, ALL), expected, rtol=0, atol=2e-4)
