"""One chunk of tokens through keras-hub's layers, with caches of our own.

The layers, norms and attention are keras-hub's; how a layer remembers is written here, because
theirs keeps every position in sliding layers too (1.2 GB of 270M at 32,768 tokens).

- A global layer has a cache of a fixed number of positions. A chunk's padding lands behind the
  real tokens, where causal attention does not look and later tokens overwrite it.
- A sliding layer has a ring of the window and `SPARE` positions: position p lies in slot
  p % size. What a slot holds is worked out from the position alone, so nothing is cleared.
  Padding is not written: each slot takes the last real token that belongs to it, if any. A chunk
  of many tokens looks at two things side by side, the ring as it was and its own keys; the first
  chunk of a conversation (`fresh`) at its own keys alone.

Everything is traced by the framework under Keras: its arrays only, `start` and `count` included.
"""

from __future__ import annotations

from typing import Any

from gemma_multi.config import ModelConfig
from gemma_multi.engines.base import SPARE

Cache = tuple[Any, Any]  # keys and values, [1, positions, KV, H] each


def cache_positions(config: ModelConfig, layer: int, capacity: int) -> int:
    """Positions that a layer keeps when its session has room for `capacity`."""
    return config.sliding_window + SPARE if config.is_sliding(layer) else capacity


def run_layers(
    backbone: Any, config: ModelConfig, ids: Any, caches: list[Cache], start: Any, count: Any,
    fresh: bool,
) -> tuple[Any, list[Any], list[Cache]]:  # fmt: skip
    """`i32[1, T]`, of which `count` are real -> (the last norm's output `[1, T, D]`, the hidden
    states before it, the caches). `fresh`: nothing was read before."""
    from keras import ops

    x = backbone.token_embedding(ids)
    x = x * ops.cast(config.stream_scale, x.dtype)
    states, written = [x], []
    for i, (layer, cache) in enumerate(zip(backbone.transformer_layers, caches, strict=True)):
        window = config.sliding_window if config.is_sliding(i) else None
        x, cache = _run_layer(layer, x, cache, start, count, window, fresh)
        written.append(cache)
        states.append(x)
    return backbone.layer_norm(x), states, written


def _run_layer(
    layer: Any, x: Any, cache: Cache, start: Any, count: Any, window: int | None, fresh: bool
) -> tuple[Any, Cache]:
    from keras import activations

    attended, cache = _attend(
        layer.attention, layer.pre_attention_norm(x), cache, start, count, window, fresh
    )
    x = x + layer.post_attention_norm(attended)
    h = layer.pre_ffw_norm(x)
    h = activations.gelu(layer.gating_ffw(h), approximate=True) * layer.gating_ffw_2(h)
    return x + layer.post_ffw_norm(layer.ffw_linear(h)), cache


def _attend(
    attention: Any, x: Any, cache: Cache, start: Any, count: Any, window: int | None, fresh: bool
) -> tuple[Any, Cache]:
    query = attention._apply_rope(attention.query_norm(attention.query_dense(x)), start)
    key = attention._apply_rope(attention.key_norm(attention.key_dense(x)), start)
    new = (key, attention.value_dense(x))
    if window is None:
        cache = _write(cache, new, start)
        (keys, values), mask = cache, _seen_globally(x, cache, start)
    elif x.shape[1] == 1:
        cache = _write(cache, new, start % cache[0].shape[1])
        (keys, values), mask = cache, _seen_in_ring(cache, start, start, window)
    else:
        keys, values = new if fresh else _side_by_side(cache, new)
        within = _seen_within(x, window)
        mask = within if fresh else _seen_side_by_side(within, cache, start, window)
        cache = _write_ring(cache, new, start, count)
    mixed = attention._compute_attention(query, keys, values, mask)
    return attention.output_dense(mixed), cache


def _write(cache: Cache, new: Cache, at: Any) -> Cache:
    from keras import ops

    keys, values = (
        ops.slice_update(old, (0, at, 0, 0), ops.cast(rows, old.dtype))
        for old, rows in zip(cache, new, strict=True)
    )
    return keys, values


def _write_ring(cache: Cache, new: Cache, start: Any, count: Any) -> Cache:
    """Each slot takes the last real row that belongs to it, or keeps what it has."""
    from keras import ops

    size, width = cache[0].shape[1], new[0].shape[1]
    row = _held(size, start + count - 1) - start  # i32[R]; before 0: an older position
    at = ops.clip(row, 0, width - 1)
    taken = ops.reshape(row >= 0, (1, size, 1, 1))
    keys, values = (
        ops.where(taken, ops.cast(ops.take(rows, at, axis=1), old.dtype), old)
        for old, rows in zip(cache, new, strict=True)
    )
    return keys, values


def _side_by_side(cache: Cache, new: Cache) -> Cache:
    from keras import ops

    keys, values = (ops.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True))
    return keys, values


def _held(size: int, newest: Any) -> Any:
    """The position that each slot of a ring holds, `i32[R]`; below 0 where it holds none."""
    from keras import ops

    return newest - ops.mod(newest - ops.arange(size, dtype="int32"), size)


def _seen_globally(x: Any, cache: Cache, start: Any) -> Any:
    """`bool[1, T, positions]`."""
    from keras import ops

    queries = start + ops.arange(x.shape[1], dtype="int32")[:, None]
    return (ops.arange(cache[0].shape[1], dtype="int32")[None] <= queries)[None]


def _seen_in_ring(cache: Cache, query: Any, newest: Any, window: int) -> Any:
    """`bool[1, Q, R]` for queries at positions `i32[Q, 1]`, or at one."""
    from keras import ops

    held = _held(cache[0].shape[1], newest)[None]
    return ops.logical_and(held >= 0, held > query - window)[None]


def _seen_within(x: Any, window: int) -> Any:
    """`bool[1, T, T]`: a chunk's own keys."""
    from keras import ops

    rows = ops.arange(x.shape[1], dtype="int32")
    behind = rows[:, None] - rows[None]
    return ops.logical_and(behind >= 0, behind < window)[None]


def _seen_side_by_side(within: Any, cache: Cache, start: Any, window: int) -> Any:
    """`bool[1, T, R + T]`: the ring as it was, then the chunk itself."""
    from keras import ops

    queries = start + ops.arange(within.shape[1], dtype="int32")[:, None]
    return ops.concatenate([_seen_in_ring(cache, queries, start - 1, window), within], axis=2)
