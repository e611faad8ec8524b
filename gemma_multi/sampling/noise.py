"""Gumbel noise for tokens, as a hash of (seed, position, token id) and not a generator's state.

Every function takes an array namespace: NumPy, MLX or JAX. It is integer arithmetic up to the last
step, so that all of them, on any device, agree to a rounding of the logarithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BITS = 23  # of noise
MOST_NOISE = 16.7  # -log(-log((2**23 - 0.5) / 2**23)), rounded up
_STEP = 0x9E3779B9


def gumbel(xp: Any, seed: int, position: int, ids: Any) -> Any:
    """Noise `f32[N]` for the tokens `ids`, the one of which is chosen will stand at `position`."""
    keys = xp.array(seed_keys(seed))
    return as_noise(xp, noise_bits(xp, seeded(xp, keys, xp.array(ids)), position_key(position)))


def seed_keys(seed: int) -> np.ndarray:
    """What `seeded` needs of a seed of 64 bits: `u32[2]`."""
    words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
    return position_keys(np, words)


def seeded(xp: Any, keys: Any, ids: Any) -> Any:
    """The part of the hash that does not depend on the position, `u32[..., N]`, of `keys`,
    `u32[..., 2]`, and `ids`, `[..., N]`."""
    state = ids.astype(xp.uint32)
    for word in (0, 1):
        state = _scramble(xp, state ^ keys[..., word : word + 1])
    return state


def position_key(position: int) -> np.ndarray:
    """`u32[1]`."""
    return position_keys(np, np.array([position & 0xFFFFFFFF], np.uint32))


def position_keys(xp: Any, positions: Any) -> Any:
    """The same of many positions, `u32[N]`, on a device."""
    return _scramble(xp, positions + xp.array(_STEP, dtype=xp.uint32))


def noise_bits(xp: Any, seeds: Any, key: Any) -> Any:
    """Uniform whole numbers below 2**23 for a position: `u32[..., N]`."""
    return _scramble(xp, seeds ^ xp.array(key)) >> (32 - BITS)


def as_noise(xp: Any, bits: Any) -> Any:
    """`f32` of the same shape."""
    # moved to the middle of their step: never 0 or 1, and exact in float32
    uniform = (bits.astype(xp.float32) + 0.5) * 2.0**-BITS
    return -xp.log(-xp.log(uniform))


def _scramble(xp: Any, x: Any) -> Any:
    """A bijection of 32-bit words that changes every output bit with every input bit."""
    x = x ^ (x >> 16)
    x = x * xp.array(0x21F0AAAD, dtype=xp.uint32)
    x = x ^ (x >> 15)
    x = x * xp.array(0x735A2D97, dtype=xp.uint32)
    return x ^ (x >> 15)
