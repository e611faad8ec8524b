"""Attention in training on JAX: causal, within an example, and for sliding layers in blocks.

A token of a sliding layer sees `window` positions back. Cut into blocks of `window`, a block's
queries see only their own block's keys and those of the block before, so scores of `[T, 2 window]`
are made instead of `[T, T]`: for a window of 64 in 512 tokens a quarter of the work.
"""

from __future__ import annotations

from typing import Any

Array = Any


def attend(
    jax: Any, q: Array, k: Array, v: Array, segments: Array, window: int | None, scale: float
) -> Array:
    """q `[B, T, heads, dim]`, k and v `[B, T, kv_heads, dim]` -> `[B, T, heads, dim]`.

    Tokens of one row with equal `segments` (`i32[B, T]`) belong together.
    """
    jnp, length = jax.numpy, q.shape[1]
    if window is None or length <= 2 * window:
        mask = _visible(jnp, segments, segments, 0, window)
        return _attention(jax, q, k, v, mask, scale)
    q, k, v = (_blocks(jnp, x, window) for x in (q, k, v))
    # padding belongs to no example; so do the keys before the first block
    own = _blocks(jnp, segments + 1, window)
    k, v, theirs = (_with_block_before(jnp, x) for x in (k, v, own))
    mask = _visible(jnp, _merged(own), _merged(theirs), window, window)
    out = _attention(jax, _merged(q), _merged(k), _merged(v), mask, scale)
    return out.reshape(q.shape[0], -1, *out.shape[2:])[:, :length]


def _attention(jax: Any, q: Array, k: Array, v: Array, mask: Array, scale: float) -> Array:
    dtype = q.dtype
    if dtype == "float16" and jax.default_backend() == "cpu":
        # JAX asks for products of float16 summed in float32, and XLA has none on a CPU
        q, k, v = (x.astype("float32") for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    return out.astype(dtype)


def _visible(jnp: Any, queries: Array, keys: Array, offset: int, window: int | None) -> Array:
    """`bool[B, Q, K]`: query `i` stands `offset` behind key `i`. All of them see themselves."""
    i = jnp.arange(queries.shape[1])[:, None] + offset
    j = jnp.arange(keys.shape[1])[None, :]
    mask = i >= j
    if window is not None:
        mask &= i - j < window
    return mask & (queries[:, :, None] == keys[:, None, :])


def _blocks(jnp: Any, x: Array, size: int) -> Array:
    """`[B, T, ...]` -> `[B, blocks, size, ...]`, filled up with zeros."""
    pad = [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)]
    x = jnp.pad(x, pad)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _with_block_before(jnp: Any, x: Array) -> Array:
    """`[B, blocks, size, ...]` -> `[B, blocks, 2 size, ...]`."""
    before = jnp.pad(x[:, :-1], [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)])
    return jnp.concatenate([before, x], axis=2)


def _merged(x: Array) -> Array:
    """`[B, blocks, size, ...]` -> `[B * blocks, size, ...]`."""
    return x.reshape(-1, *x.shape[2:])
