"""Tokens to read, and how close two ways of reading them must be."""

from __future__ import annotations

import numpy as np

from gemma_multi.engines import Engine

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
