"""One chunk of tokens through keras-hub's layers, with caches of our own.

The layers, norms and attention are keras-hub's; how a layer remembers is written here, because
theirs keeps every position in sliding layers too (1.2 GB of 270M at 32,768 tokens).

- Conversations lie side by side, one in a row. Each reads the same number of tokens, of which as
  many as it says are real, from a position of its own; one that reads none stays as it is.
- A global layer has a cache of a fixed number of positions. A chunk's padding lands behind the
  real tokens, where causal attention does not look and later tokens overwrite it.
- A sliding layer has a ring of the window and `SPARE` positions, or of the global layers' where
  they have fewer: position p lies in slot p % size. What a slot holds is worked out from the
  position alone, so nothing is cleared. Padding is not written: each slot takes the last real
  token that belongs to it, if any. A chunk of many tokens looks at two things side by side, the
  ring as it was and its own keys; the first chunk of a conversation (`fresh`) at its own keys
  alone.

Everything is traced by the framework under Keras: its arrays only, `start` and `count` included.
"""

from __future__ import annotations

from typing import Any

from gemma_multi.config import ModelConfig
from gemma_multi.engines.caches import SPARE
from gemma_multi.engines.keras_backbone import run_block

Cache = tuple[Any, Any]  # keys and values, [B, positions, KV, H] each


def cache_positions(config: ModelConfig, layer: int, capacity: int) -> int:
    """Positions that a layer keeps when its session has room for `capacity`."""
    ring = config.sliding_window + SPARE
    return min(ring, capacity) if config.is_sliding(layer) else capacity


def run_layers(
    backbone: Any, config: ModelConfig, ids: Any, caches: list[Cache], start: Any, count: Any,
    fresh: bool,
) -> tuple[Any, list[Any], list[Cache]]:  # fmt: skip
    """`i32[B, T]`, of which `count` (`i32[B]`) are real and follow `start` others (`i32[B]`) ->
    (the last norm's output `[B, T, D]`, the hidden states before it, the caches). `fresh`: nothing
    was read before by those that read now."""
    from keras import ops

    x = backbone.token_embedding(ids)
    x = x * ops.cast(config.stream_scale, x.dtype)
    states, written = [x], []
    for i, (layer, cache) in enumerate(zip(backbone.transformer_layers, caches, strict=True)):
        window = config.sliding_window if config.is_sliding(i) else None

        def attend(n: Any, layer: Any = layer, cache: Cache = cache, window: Any = window) -> Any:
            mixed, after = _attend(layer.attention, n, cache, start, count, window, fresh)
            written.append(after)
            return mixed

        x = run_block(layer, x, attend)
        states.append(x)
    return backbone.layer_norm(x), states, written


def _attend(
    attention: Any, x: Any, cache: Cache, start: Any, count: Any, window: int | None, fresh: bool
) -> tuple[Any, Cache]:
    from keras import ops

    positions = start[:, None] + ops.arange(x.shape[1], dtype="int32")  # i32[B, T]
    rotate = attention.rope_layer
    query = rotate(attention.query_norm(attention.query_dense(x)), positions=positions)
    key = rotate(attention.key_norm(attention.key_dense(x)), positions=positions)
    new = (key, attention.value_dense(x))
    if window is None:
        cache = _write(cache, new, start)
        (keys, values), mask = cache, _seen_globally(cache, positions)
    elif x.shape[1] == 1:
        cache = _write(cache, new, start % cache[0].shape[1])
        (keys, values), mask = cache, _seen_in_ring(cache, positions, start, window)
    else:
        keys, values = new if fresh else _side_by_side(cache, new)
        mask = _seen_within(x, window)
        if not fresh:
            ring = _seen_in_ring(cache, positions, start - 1, window)
            mask = ops.concatenate([ring, ops.repeat(mask, x.shape[0], axis=0)], axis=2)
        cache = _write_ring(cache, new, start, count)
    mixed = attention._compute_attention(query, keys, values, mask)
    return attention.output_dense(mixed), cache


def _write(cache: Cache, new: Cache, at: Any) -> Cache:
    """Tokens of each row from position `at`, `i32[B]`, on."""
    from keras import ops

    rows, width = new[0].shape[:2]
    positions = at[:, None] + ops.arange(width, dtype="int32")
    places = ops.stack([ops.repeat(ops.arange(rows, dtype="int32")[:, None], width, 1), positions])
    places = ops.reshape(ops.transpose(places, (1, 2, 0)), (rows * width, 2))
    keys, values = (
        ops.scatter_update(
            old, places, ops.reshape(ops.cast(given, old.dtype), (-1, *given.shape[2:]))
        )
        for old, given in zip(cache, new, strict=True)
    )
    return keys, values


def _write_ring(cache: Cache, new: Cache, start: Any, count: Any) -> Cache:
    """Each slot takes the last real token that belongs to it, or keeps what it has."""
    from keras import ops

    size, (rows, width) = cache[0].shape[1], new[0].shape[:2]
    token = _held(size, start + count - 1) - start[:, None]  # i32[B, R]; below 0: an older one
    at = ops.clip(token, 0, width - 1) + width * ops.arange(rows, dtype="int32")[:, None]
    taken = ops.reshape(token >= 0, (rows, size, 1, 1))
    keys, values = (
        ops.where(
            taken,
            ops.take(ops.reshape(ops.cast(given, old.dtype), (-1, *given.shape[2:])), at, axis=0),
            old,
        )
        for old, given in zip(cache, new, strict=True)
    )
    return keys, values


def _side_by_side(cache: Cache, new: Cache) -> Cache:
    from keras import ops

    keys, values = (ops.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True))
    return keys, values


def _held(size: int, newest: Any) -> Any:
    """The position that each slot of a ring holds, `i32[B, R]`; below 0 where it holds none."""
    from keras import ops

    newest = newest[:, None]
    return newest - ops.mod(newest - ops.arange(size, dtype="int32"), size)


def _seen_globally(cache: Cache, positions: Any) -> Any:
    """`bool[B, T, positions]`."""
    from keras import ops

    return ops.arange(cache[0].shape[1], dtype="int32") <= positions[:, :, None]


def _seen_in_ring(cache: Cache, positions: Any, newest: Any, window: int) -> Any:
    """`bool[B, T, R]` for tokens at positions `i32[B, T]`, where rings hold up to `newest`."""
    from keras import ops

    held = _held(cache[0].shape[1], newest)[:, None]
    return ops.logical_and(held >= 0, held > positions[:, :, None] - window)


def _seen_within(x: Any, window: int) -> Any:
    """`bool[1, T, T]`: a chunk's own keys."""
    from keras import ops

    places = ops.arange(x.shape[1], dtype="int32")
    behind = places[:, None] - places[None]
    return ops.logical_and(behind >= 0, behind < window)[None]
