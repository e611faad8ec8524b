"""Gemma 3's decoder as TensorFlow Lite operators.

Design choices:
- A sliding layer keeps its window and a few positions more (`layout.RING_SPARE`). A call
  with one token writes first: its slot holds a position that has left the window. A call with
  many tokens looks at two things side by side, the cache as it was before and its own keys and
  values, and writes at the end.
- A sliding layer's cache is a ring: position p lies in slot p % R. What a slot holds is worked
  out from the position alone (`_ring_ages`): there is nothing to clear and no mask to pass in.
- What differs by row comes from the positions that go in, never from a constant of one column: the
  GPU delegate takes such a constant's first row for all. (One of equal rows is fine.)
- Masks are arithmetic, `min((distance - 0.5) * 1e30, 0)`, because the CPU delegate has no
  comparisons; ones and zeros that select are multiplied for the same reason.
- Rows of padding come last. They see real tokens only, so they stay finite; no real token sees
  them, and they are not written to a ring. In a global layer they land behind the real tokens,
  where nobody looks before they are overwritten.
- An int8 cache holds each row (one position of one head) as whole numbers of -127..127 and a
  float32 scale. Attention sees the rounded row from the first moment, so that reading a text in
  one call or in ten gives the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.exporters.tflite.flatbuffer import ModelWriter, Subgraph, Value, Weight
from gemma_multi.formats.tflite.layout import (
    DECODE,
    HIDDEN,
    HIDDEN_STATE,
    HIDDEN_STATES,
    LOGITS,
    POSITIONS,
    PREFILL,
    QUERY_KEY_NORM,
    SCORE,
    SCORE_TOKENS,
    TOKENS,
    TRACE,
    cache_names,
    cache_positions,
    cache_scale_names,
    gain_name,
    ring_positions,
)

_STEEP = np.float32(1e30)  # times half a position: far below any score, far above -inf
_INT8_MAX = 127


@dataclass(frozen=True)
class Shape:
    """What an export fixes besides the model."""

    context_length: int
    prefill: tuple[int, ...]
    int8_global_caches: bool = False
    trace: bool = False  # adds the signatures that give every layer's hidden states


def add_signatures(
    model: ModelWriter, config: ModelConfig, shape: Shape, weights: Mapping[str, Weight],
    gains: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """All signatures of one decoder. `gains` are the norms' factors, 1 + w, by tensor name."""
    for size in shape.prefill:
        _Decoder(model.subgraph(PREFILL.format(size)), config, shape, weights, gains, size).build()
    decode = _Decoder(model.subgraph(DECODE), config, shape, weights, gains, 1)
    decode.build(LOGITS)
    _Decoder(model.subgraph(HIDDEN), config, shape, weights, gains, 1).build(HIDDEN_STATE)
    size = min(SCORE_TOKENS, shape.context_length)
    _Decoder(model.subgraph(SCORE), config, shape, weights, gains, size).build(LOGITS)
    for count in {1, size} if shape.trace else ():
        graph = model.subgraph(TRACE.format(count))
        _Decoder(graph, config, shape, weights, gains, count).build(HIDDEN_STATES)


@dataclass
class _LayerCache:
    """A layer's keys or values: as they came in, or with this call's rows once written."""

    name: str
    rows: Value  # f32 or i8 [1, KV, positions, H]
    scale_name: str = ""
    scales: Value | None = None  # f32[1, KV, 1, positions], of an int8 cache
    new: Value | None = None  # of the type of `rows`: [1, KV, T, H]
    new_scales: Value | None = None  # f32[1, KV, 1, T]


class _Decoder:
    """One signature: T tokens through all layers."""

    def __init__(
        self, graph: Subgraph, config: ModelConfig, shape: Shape,
        weights: Mapping[str, Weight], gains: Mapping[str, np.ndarray], tokens: int,
    ) -> None:  # fmt: skip
        self.graph, self.config, self.shape = graph, config, shape
        self.weights, self.gains, self.count = weights, gains, tokens
        self.writes_first = tokens == 1
        self.window = config.sliding_window
        self.ring = ring_positions(config, shape.context_length)
        self.ids = graph.input(TOKENS, (1, tokens), np.int32)
        self.positions = graph.input(POSITIONS, (tokens,), np.int32)
        # LiteRT-LM takes the context length from the first key cache: a global layer's, if any
        layers = sorted(range(config.num_hidden_layers), key=config.is_sliding)
        caches = {i: (self._cache_input(i, 0), self._cache_input(i, 1)) for i in layers}
        self.caches = [caches[i] for i in range(config.num_hidden_layers)]
        self.start = graph.slice(self.positions, 0, 0, 1)  # i32[1]
        self.offsets = np.arange(tokens, dtype=np.float32)[:, None]  # of each row from the start
        start = graph.reshape(graph.cast(self.start, np.float32), (1, 1))
        position = graph.reshape(graph.cast(self.positions, np.float32), (tokens, 1))
        self.global_mask, self.local_mask = self._masks(start, position)
        self.rotations = {  # by whether the layer is a sliding one
            False: self._rotation(position, config.rope_theta, config.rope_scaling_factor),
            True: self._rotation(position, config.rope_local_theta, 1.0),
        }
        if tokens > 1:
            self.ring_update = self._ring_update()

    def build(self, wanted: str = "") -> None:
        """`wanted` is the output besides the caches: the logits, the last hidden state, all of
        them, or nothing."""
        graph, config = self.graph, self.config
        ids = graph.reshape(self.ids, (self.count,))
        x = graph.embedding(ids, self.weights[EMBEDDING])
        x = graph.multiply(x, config.stream_scale)
        states = [x]
        for i in range(config.num_hidden_layers):
            last = i == config.num_hidden_layers - 1
            x = self._layer(i, x, only_cache=last and not wanted)
            states.append(x)
        if wanted:
            x = self._norm(x, "model.norm.weight")
            if wanted == LOGITS:
                x = graph.linear(x, self.weights[EMBEDDING])
            elif wanted == HIDDEN_STATES:
                x = graph.concatenate([*states, x], 1)
            graph.output(wanted, graph.reshape(x, (1, *x.shape)))
        for i in range(config.num_hidden_layers):
            for cache in self.caches[i]:
                if not self.writes_first:
                    self._write(cache, ring=config.is_sliding(i))
                graph.output(cache.name, cache.rows)
                if cache.scales is not None:
                    graph.output(cache.scale_name, cache.scales)
        graph.finish()

    def _layer(self, i: int, x: Value, only_cache: bool) -> Value:
        graph, name = self.graph, f"model.layers.{i}.{{}}.weight".format
        h = self._norm(x, name("input_layernorm"))
        mixed = self._attention(i, graph.linear(h, self.weights[name("self_attn.qkv")]))
        if only_cache:
            return x
        h = graph.linear(mixed, self.weights[name("self_attn.o")])
        x = graph.add(x, self._norm(h, name("post_attention_layernorm")))
        h = self._norm(x, name("pre_feedforward_layernorm"))
        h = graph.linear(h, self.weights[name("mlp.gate_up")])
        width = self.config.intermediate_size
        gate, up = graph.slice(h, 1, 0, width), graph.slice(h, 1, width, width)
        h = graph.multiply(graph.gelu_tanh(gate), up)
        h = graph.linear(h, self.weights[name("mlp.down")])
        return graph.add(x, self._norm(h, name("post_feedforward_layernorm")))

    def _norm(self, x: Value, name: str) -> Value:
        return self._normalize(x, self.gains[name], name)

    def _normalize(self, x: Value, gain: np.ndarray, name: str) -> Value:
        """RMS norm over the last axis."""
        graph = self.graph
        power = graph.mean_last(graph.multiply(x, x))
        factor = graph.rsqrt(graph.add(power, self.config.norm_eps(name)))
        return graph.multiply(graph.multiply(x, factor), graph.constant(gain, name=gain_name(name)))

    # attention

    def _attention(self, i: int, qkv: Value) -> Value:
        """`f32[T, (heads + 2 KV) H]` to the mixed values, `f32[T, heads * H]`."""
        graph, config = self.graph, self.config
        heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        t, sliding = self.count, config.is_sliding(i)
        qkv = graph.reshape(qkv, (t, heads + 2 * kv, width))
        # queries and keys are normed and turned together; the query scale is in the gain
        name = f"model.layers.{i}.self_attn.{{}}_norm.weight".format
        gain = np.concatenate([np.tile(self.gains[name("q")] * config.query_scale, (heads, 1)),
                               np.tile(self.gains[name("k")], (kv, 1))])  # fmt: skip
        both = graph.slice(qkv, 1, 0, heads + kv)
        norm = f"model.layers.{i}.{QUERY_KEY_NORM}.weight"
        qk = self._normalize(both, gain.astype(np.float32), norm)
        qk = self._rotate(qk, sliding)
        by_head = (1, 0, 2)
        q = graph.transpose(graph.slice(qk, 1, 0, heads), by_head)
        k = graph.transpose(graph.slice(qk, 1, heads, kv), by_head)
        v = graph.transpose(graph.slice(qkv, 1, heads + kv, kv), by_head)
        q = graph.reshape(q, (1, kv, heads // kv * t, width))
        keys, values = self.caches[i]
        k = self._remember(keys, graph.reshape(k, (1, kv, t, width)))
        v = self._remember(values, graph.reshape(v, (1, kv, t, width)))

        if self.writes_first:
            self._write(keys, sliding)
            self._write(values, sliding)
        scores = graph.matmul(q, self._plain(keys), transpose_b=True)
        if keys.scales is not None:
            scores = graph.multiply(scores, keys.scales)
        kept = keys.rows.shape[2]
        if not self.writes_first:
            scores = graph.concatenate([scores, graph.matmul(q, k, transpose_b=True)], -1)
        scores = graph.reshape(scores, (heads, t, scores.shape[-1]))
        scores = graph.add(scores, self.local_mask if sliding else self.global_mask)
        shares = graph.softmax(scores)
        shares = graph.reshape(shares, (1, kv, heads // kv * t, shares.shape[-1]))
        before = graph.slice(shares, 3, 0, kept)
        if values.scales is not None:
            before = graph.multiply(before, values.scales)
        mixed = graph.matmul(before, self._plain(values))
        if not self.writes_first:
            mixed = graph.add(mixed, graph.matmul(graph.slice(shares, 3, kept, t), v))
        mixed = graph.transpose(graph.reshape(mixed, (heads, t, width)), by_head)
        return graph.reshape(mixed, (t, heads * width))

    def _masks(self, start: Value, position: Value) -> tuple[Value, Value]:
        """What is added to scores: global `[T, C (+ T)]` and local `[T, R (+ T)]`.

        The columns are the cache's slots and, unless it was written first, this call's tokens.
        """
        graph, t = self.graph, self.count
        known = graph.add(start, 1.0) if self.writes_first else start  # positions in the cache
        slots = np.arange(self.shape.context_length, dtype=np.float32)[None]
        written = self._steps_below(graph.subtract(known, slots))
        # a slot of age a holds position known - 1 - a
        ages = self._ring_ages()
        filled = self._steps_below(graph.subtract(known, ages))
        reach: Any = np.float32(self.window)  # of a query, in ages
        if not self.writes_first:
            reach = graph.subtract(self.window - 1, graph.subtract(position, start))
        reached = self._steps_below(graph.subtract(reach, ages))
        local = graph.minimum(filled, reached)
        if self.writes_first:
            return written, local
        ahead = self.offsets.T - self.offsets  # of a key before a query: positive is the future
        causal = np.where(ahead <= 0, 0, -_STEEP).astype(np.float32)
        near = np.where((ahead <= 0) & (ahead > -self.window), 0, -_STEEP).astype(np.float32)
        written = graph.add(written, np.zeros((t, 1), np.float32))  # the same for every row
        return (
            graph.concatenate([written, graph.constant(causal)], 1),
            graph.concatenate([local, graph.constant(near)], 1),
        )

    def _steps_below(self, distance: Value) -> Value:
        """0 where the whole number `distance` is at least 1, else about -1e30 a step."""
        graph = self.graph
        return graph.minimum(graph.multiply(graph.subtract(distance, 0.5), _STEEP), 0.0)

    def _ring_ages(self) -> Value:
        """How far behind the newest position in the cache each slot's is: `f32[1, R]`."""
        graph, slots = self.graph, self.ring
        newest = 0 if self.writes_first else -1  # from the start of this call
        ages = graph.add(self.start, newest - np.arange(slots, dtype=np.int32))
        ages = graph.floor_mod(ages, np.int32(slots))
        return graph.reshape(graph.cast(ages, np.float32), (1, slots))

    def _rotation(self, position: Value, theta: float, factor: float) -> tuple[Value, Value]:
        """Cosines, and sines with the sign of the half they multiply: `f32[T, 1, H]` each."""
        graph, width = self.graph, self.config.head_dim
        frequencies = theta ** (-np.arange(0, width, 2) / width) / factor
        angles = graph.multiply(position, frequencies[None].astype(np.float32))
        cos, sin = graph.cos(angles), graph.sin(angles)
        shape = (self.count, 1, width)
        return (
            graph.reshape(graph.concatenate([cos, cos], 1), shape),
            graph.reshape(graph.concatenate([graph.negative(sin), sin], 1), shape),
        )

    def _rotate(self, x: Value, sliding: bool) -> Value:
        graph, half = self.graph, self.config.head_dim // 2
        cos, sin = self.rotations[sliding]
        turned = graph.concatenate([graph.slice(x, 2, half, half), graph.slice(x, 2, 0, half)], 2)
        return graph.add(graph.multiply(x, cos), graph.multiply(turned, sin))

    # caches

    def _cache_input(self, layer: int, which: int) -> _LayerCache:
        graph, config = self.graph, self.config
        positions = cache_positions(config, layer, self.shape.context_length)
        shape = (1, config.num_key_value_heads, positions, config.head_dim)
        name = cache_names(layer)[which]
        if not self.shape.int8_global_caches or config.is_sliding(layer):
            return _LayerCache(name, graph.input(name, shape))
        scale = cache_scale_names(layer)[which]
        old = graph.input(name, shape, np.int8)
        scales = graph.input(scale, (1, config.num_key_value_heads, 1, positions))
        return _LayerCache(name, old, scale, scales)

    def _plain(self, cache: _LayerCache) -> Value:
        """The cache as numbers; an int8 one without its scales, which are multiplied in later.

        A cast, because the CPU delegate takes DEQUANTIZE in front of a matrix product for
        something else and asks for positions squared of memory.
        """
        if cache.scales is None:
            return cache.rows
        return self.graph.cast(cache.rows, np.float32)

    def _remember(self, cache: _LayerCache, new: Value) -> Value:
        """Sets what will be written; returns it as later calls will see it."""
        if cache.scales is None:
            cache.new = new
            return new
        graph = self.graph
        largest = graph.maximum(graph.max_last(graph.absolute(new)), 1e-6)
        scales = graph.multiply(largest, 1 / _INT8_MAX)
        cache.new = graph.to_int8(graph.divide(new, scales))
        cache.new_scales = graph.transpose(scales, (0, 1, 3, 2))
        return graph.multiply(graph.cast(cache.new, np.float32), scales)

    def _write(self, cache: _LayerCache, ring: bool) -> None:
        """Puts this call's rows into the cache."""
        assert cache.new is not None
        graph = self.graph
        if ring and not self.writes_first:
            cache.rows = self._write_ring(cache.rows, cache.new)
            return
        slot = graph.floor_mod(self.start, np.int32(self.ring)) if ring else self.start
        row_axis, scale_axis = np.eye(4, dtype=np.int32)[2:]
        cache.rows = graph.update_slice(cache.rows, cache.new, graph.multiply(slot, row_axis))
        if cache.scales is not None and cache.new_scales is not None:
            at = graph.multiply(slot, scale_axis)
            cache.scales = graph.update_slice(cache.scales, cache.new_scales, at)

    def _write_ring(self, old: Value, new: Value) -> Value:
        """Many rows at once: each slot takes the last real row that belongs to it, if any.

        Rows are moved by a matrix of zeros and ones, which is exact, and which the CPU delegate
        can do, as it cannot gather.
        """
        graph = self.graph
        takes, keeps = self.ring_update
        rows = graph.matmul(takes, new)
        # what depends on inputs alone runs first, for all layers at once, and takes 16 MB: wait
        wait = graph.multiply(graph.slice(rows, 3, 0, 1), 0.0)
        return graph.add(rows, graph.multiply(graph.add(keeps, wait), old))

    def _ring_update(self) -> tuple[Value, Value]:
        """Which row each slot takes, `f32[1, KV, R, T]`, and which slots keep theirs, `[R, 1]`."""
        graph, slots = self.graph, self.ring
        last = graph.max_last(self.positions)  # padding has position 0
        behind = graph.floor_mod(
            graph.subtract(last, np.arange(slots, dtype=np.int32)), np.int32(slots)
        )
        row = graph.subtract(graph.subtract(last, self.start), behind)  # i32[R], < 0: keep
        row = graph.reshape(graph.cast(row, np.float32), (1, 1, slots, 1))
        distance = graph.absolute(graph.subtract(row, self.offsets.reshape(1, 1, 1, -1)))
        takes = graph.maximum(graph.subtract(np.float32(1), distance), 0.0)
        keeps = graph.minimum(graph.maximum(graph.negative(row), 0.0), 1.0)
        return graph.concatenate([takes] * self.config.num_key_value_heads, 1), keeps
