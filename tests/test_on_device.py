"""What a device chooses is what the host chooses, for all options that it can do."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

from gemma_multi.quantization.tensor import BFLOAT16
from gemma_multi.sampling import GenerationOptions, choose
from gemma_multi.sampling.on_device import Namespace, can_choose, choose_rows, option_arrays

NAMESPACES = {
    "jax": Namespace(jnp, lambda x, k: jax.lax.top_k(x, k)[1]),
    "mlx": Namespace(mx, lambda x, k: mx.argsort(-x, axis=-1)[:, :k]),
}
OPTIONS = [
    {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"top_k": 0, "top_p": 1.0}, {"top_k": 0, "top_p": 1.0, "temperature": 0.4},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.05}, {"top_k": 0, "top_p": 1.0, "min_p": 1.0},
    {}, {"top_k": 1}, {"top_k": 40, "top_p": 1.0, "temperature": 1.7}, {"top_p": 1e-30},
    {"top_k": 64, "top_p": 0.5, "min_p": 0.02}, {"top_k": 200, "top_p": 0.99, "temperature": 0.8},
    {"top_k": 256, "top_p": 1.0, "min_p": 0.1}, {"temperature": 1e-6}, {"top_p": 0.7, "min_p": 1.0},
]  # fmt: skip
NOTHING = np.zeros(0, np.int64)


def on_device(
    name: str, logits: np.ndarray, rows: list[Any], positions: np.ndarray, vocabulary: int
) -> np.ndarray:
    arrays, ways = option_arrays(rows, [vocabulary] * len(rows))
    namespace = NAMESPACES[name]
    given = {key: namespace.xp.array(array) for key, array in arrays.items()}
    return np.array(choose_rows(
        namespace, namespace.xp.array(logits), given, namespace.xp.array(positions), ways
    ))  # fmt: skip


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("size", [320, 4096, 30_001, 100_000])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_rows_of_all_kinds_choose_what_the_host_chooses(
    name: str, size: int, rounded: bool, spread: float
) -> None:
    """Rounded to bfloat16 there are many equal scores, at the edge of a top-k too."""
    rng = np.random.default_rng(zlib.crc32(f"{size} {rounded} {spread}".encode()))
    count = 60 if size < 10_000 else 6
    for repeat in range(2):
        rows = [GenerationOptions(seed=int(rng.integers(1 << 63)), **given)
                for given in OPTIONS for _ in range(count // 3)]  # fmt: skip
        logits = (rng.standard_normal((len(rows), size)) * spread).astype(np.float32)
        if rounded:
            logits = logits.astype(BFLOAT16).astype(np.float32)
        positions = rng.integers(0, 1 << 20, len(rows)).astype(np.int32)
        vocabulary = size - 7 * repeat
        found = on_device(name, logits, rows, positions, vocabulary)
        expected = np.array([
            choose(row[:vocabulary], NOTHING, options, int(position))
            for row, options, position in zip(logits, rows, positions, strict=True)
        ])  # fmt: skip
        undecided = found < 0
        assert undecided.mean() < 0.1
        assert not (undecided & (not rounded)).any()
        wrong = np.flatnonzero(~undecided & (found != expected))
        assert not len(wrong), [(rows[i], found[i], expected[i]) for i in wrong]


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_row_without_a_choice_says_so_and_others_do_not_mind(name: str) -> None:
    """Whose logits are not finite, or of which more are equal than are looked at."""
    rng = np.random.default_rng(0)
    rows = [GenerationOptions(seed=i, **OPTIONS[(0, 2, 6)[i % 3]]) for i in range(15)]
    logits = rng.standard_normal((15, 30_016)).astype(np.float32)
    for i, value in enumerate((np.nan, np.inf, -np.inf)):
        logits[i] = value
        logits[i + 3, 77] = np.nan
    logits[8] = 1.0
    found = on_device(name, logits, rows, np.arange(15, dtype=np.int32), 30_016)
    assert (found[:6] == -1).all()
    assert found[8] == -1
    for i in (6, 7, *range(9, 15)):
        assert found[i] == choose(logits[i], NOTHING, rows[i], i)


@pytest.mark.parametrize("given", [
    {"repetition_penalty": 1.1}, {"top_k": 257}, {"top_k": 0, "top_p": 0.9},
    {"repetition_penalty": 1.1, "temperature": 0.0},
])  # fmt: skip
def test_what_depends_on_more_than_a_device_looks_at_is_left_to_the_host(given: dict) -> None:
    assert not can_choose(GenerationOptions(**given))
    for other in OPTIONS:
        assert can_choose(GenerationOptions(**other))
