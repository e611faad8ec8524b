"""Tokens to read, and how close two ways of reading or of continuing them must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_multi.comparison.text import disagreements
from gemma_multi.comparison.tolerances import tolerance_of
from gemma_multi.engines import Engine
from gemma_multi.model import Model

# Largest difference between two ways of reading the same tokens; logits are of size 5. The sums
# are the same up to their order, so the bound is the rounding of the activations.
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.15, "float16": 0.02, "int8": 0.15}
# Rows of the head are multiplied by activations as they are, which LiteRT rounds in front of all
ROWS_TOLERANCE = {"float32": 3e-5, "bfloat16": 0.15, "float16": 0.02, "int8": 0.2}


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 320, length)


def assert_close(engine: Engine, actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[engine.compute])


def assert_same_but_for_ties(
    model: Model, prompt: Sequence[int], theirs: str, tie: float | None = None, stopped: bool = True
) -> bool:
    """Somebody's greedy text, which ended its turn if it `stopped`, against a model's logits at
    every token. Rounded activations may decide a near tie otherwise (`tie` in logits, by default
    the model's own tolerance); whether they did."""
    if tie is None:
        tie = tolerance_of(model.engine.compute, model.engine.compute).tie
    found = disagreements(model, prompt, theirs, tie, stopped)
    assert all(one.tie for one in found), found
    return bool(found)
