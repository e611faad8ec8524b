"""Gemma 3's decoder as TensorFlow Lite operators.

Design choices:
- A sliding layer keeps its window and a few positions more (`layout.RING_SPARE`). A call
  with one token writes first: its slot holds a position that has left the window. A call with
  many tokens looks at two things side by side, the cache as it was before and its own keys and
  values, and writes at the end.
- In a file for GPUs, which may hold every number in float16, a norm divides a row by its largest
  number before it squares (`_normalize`). `odml.rms_norm`, an operator that LiteRT's GPU delegate
  has one kernel for, which sums in float32, ends the process in ai-edge-litert 2.3 for Python.
- What positions decide, masks and rotations and the slots of rings, is in `positions`.
- Rows of padding come last. They see real tokens only, so they stay finite; no real token sees
  them, and they are not written to a ring. In a global layer they land behind the real tokens,
  where nobody looks before they are overwritten.
- An int8 cache holds each row (one position of one head) as whole numbers of -127..127 and a
  float32 scale. Attention sees the rounded row from the first moment, so that reading a text in
  one call or in ten gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.exporters.tflite.flatbuffer import ModelWriter, Weight
from gemma_multi.exporters.tflite.operators import Subgraph, Value
from gemma_multi.exporters.tflite.positions import Positions, Shape
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
    cache_scale_names,
    cache_shapes,
    gain_name,
)

_INT8_MAX = 127
_LARGEST_RATIO = np.float32(128)  # of eps's root to a row: squared, float16 holds it


def add_signatures(
    model: ModelWriter, config: ModelConfig, shape: Shape, weights: Mapping[str, Weight],
    prompts: Mapping[str, Weight], gains: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """All signatures of one decoder. `prompts` are the weights that prompts are read with, `gains`
    the norms' factors, 1 + w, by tensor name."""
    for size in shape.prefill:
        graph = Subgraph(model, PREFILL.format(size))
        TfliteDecoder(graph, config, shape, prompts, gains, size).build()
    decode = TfliteDecoder(Subgraph(model, DECODE), config, shape, weights, gains, 1)
    decode.build(LOGITS)
    TfliteDecoder(Subgraph(model, HIDDEN), config, shape, weights, gains, 1).build(HIDDEN_STATE)
    size = min(SCORE_TOKENS, shape.context_length)
    TfliteDecoder(Subgraph(model, SCORE), config, shape, weights, gains, size).build(LOGITS)
    for count in {1, size} if shape.trace else ():
        graph = Subgraph(model, TRACE.format(count))
        TfliteDecoder(graph, config, shape, weights, gains, count).build(HIDDEN_STATES)


@dataclass
class _LayerCache:
    """A layer's keys or values: as they came in, or with this call's once written."""

    name: str
    held: Value  # f32 or i8, see `layout.cache_shapes`
    axis: int  # of positions
    scale_name: str = ""
    scales: Value | None = None  # f32[1, KV, 1, positions], of an int8 cache
    new: Value | None = None  # as `held`, but of this call's T positions
    new_scales: Value | None = None  # f32[1, KV, 1, T]


class TfliteDecoder:
    """One signature: T tokens through all layers."""

    def __init__(
        self, graph: Subgraph, config: ModelConfig, shape: Shape,
        weights: Mapping[str, Weight], gains: Mapping[str, np.ndarray], tokens: int,
    ) -> None:  # fmt: skip
        self.graph, self.config, self.shape = graph, config, shape
        self.weights, self.gains, self.count = weights, gains, tokens
        self.writes_first = tokens == 1
        self._begin()

    def _begin(self) -> None:
        """What goes in."""
        graph, tokens = self.graph, self.count
        self.ids = graph.input(TOKENS, (1, tokens), np.int32)
        positions = graph.input(POSITIONS, (tokens,), np.int32)
        self._take_caches(str)
        self.positions = Positions(graph, self.config, self.shape, positions)

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
                x = self._head(x)
            elif wanted == HIDDEN_STATES:
                x = graph.concatenate([*states, x], 1)
            graph.output(wanted, graph.reshape(x, (1, *x.shape)))
        self._end()
        graph.finish()

    def _end(self) -> None:
        """The caches, as they are now."""
        for i in range(self.config.num_hidden_layers):
            for cache in self.caches[i]:
                if not self.writes_first:
                    self._write(cache, ring=self.config.is_sliding(i))
                self.graph.output(cache.name, cache.held)
                if cache.scales is not None:
                    self.graph.output(cache.scale_name, cache.scales)

    def _head(self, x: Value) -> Value:
        """Row by row for GPUs: for several rows at once the delegate makes the matrix a texture,
        which ends at 8,192 to 32,768 by four rows of it, and gives zeros if it is larger."""
        graph, head = self.graph, self.weights[EMBEDDING]
        if not self.shape.gpu or self.count == 1:
            return graph.linear(x, head)
        rows = [graph.linear(graph.slice(x, 0, i, 1), head) for i in range(self.count)]
        return graph.concatenate(rows, 0)

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
        """RMS norm over the last axis. `gain` is a row, or one for each head.

        For GPUs, x / r is normed instead of x, which is the same for any r and eps / r² for eps.
        With r a row's largest number no square is above 1, and none that counts is lost below
        float16's smallest.
        """
        graph, eps = self.graph, self.config.norm_eps(name)
        more: Any = eps
        if self.shape.gpu:
            root = np.float32(math.sqrt(eps))
            # not so small that eps / r² is large
            largest = graph.maximum(graph.max_last(graph.absolute(x)), root / _LARGEST_RATIO)
            x, ratio = graph.divide(x, largest), graph.divide(root, largest)
            more = graph.multiply(ratio, ratio)
        factor = graph.rsqrt(graph.add(graph.mean_last(graph.multiply(x, x)), more))
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
        scores = self._products(q, self._plain(keys))
        if keys.scales is not None:
            scores = graph.multiply(scores, keys.scales)
        kept = keys.held.shape[keys.axis]
        if not self.writes_first:
            scores = graph.concatenate([scores, graph.matmul(q, k, transpose_b=True)], -1)
        scores = graph.reshape(scores, (heads, t, scores.shape[-1]))
        mask = self.positions.local_mask if sliding else self.positions.global_mask
        scores = graph.add(scores, mask)
        shares = graph.softmax(scores)
        shares = graph.reshape(shares, (1, kv, heads // kv * t, shares.shape[-1]))
        before = graph.slice(shares, 3, 0, kept)
        if values.scales is not None:
            before = graph.multiply(before, values.scales)
        mixed = self._products(before, self._plain(values))
        if not self.writes_first:
            own = graph.slice(shares, 3, kept, t)
            mixed = graph.add(mixed, graph.matmul(own, v, transpose_b=True))
        mixed = graph.transpose(graph.reshape(mixed, (heads, t, width)), by_head)
        return graph.reshape(mixed, (t, heads * width))

    def _products(self, rows: Value, held: Value) -> Value:
        """`f32[1, KV, M, K]` and `[1, KV, N, K]` of a cache, row by row: `[1, KV, M, N]`."""
        if self.count > 1:
            return self.graph.matmul(rows, held, transpose_b=True)
        turned = self.graph.matmul(held, rows, transpose_b=True)  # see `layout.cache_shapes`
        return self.graph.transpose(turned, (0, 1, 3, 2))

    def _rotate(self, x: Value, sliding: bool) -> Value:
        graph, half = self.graph, self.config.head_dim // 2
        cos, sin = self.positions.rotations[sliding]
        turned = graph.concatenate([graph.slice(x, 2, half, half), graph.slice(x, 2, 0, half)], 2)
        return graph.add(graph.multiply(x, cos), graph.multiply(turned, sin))

    # caches

    def _take_caches(self, named: Callable[[str], str]) -> None:
        """`named` makes a cache's name here of what `layout` calls it."""
        count = self.config.num_hidden_layers
        # LiteRT-LM takes the context length from the first key cache: a global layer's, if any
        layers = sorted(range(count), key=self.config.is_sliding)
        caches = {
            i: (self._cache_input(i, 0, named), self._cache_input(i, 1, named)) for i in layers
        }
        self.caches = [caches[i] for i in range(count)]

    def _cache_input(self, layer: int, which: int, named: Callable[[str], str]) -> _LayerCache:
        graph, config = self.graph, self.config
        shape = cache_shapes(config, layer, self.shape.context_length)[which]
        name, axis = named(cache_names(layer)[which]), 2 + which
        if not self.shape.int8_global_caches or config.is_sliding(layer):
            return _LayerCache(name, graph.input(name, shape), axis)
        scale = named(cache_scale_names(layer)[which])
        old = graph.input(name, shape, np.int8)
        scales = graph.input(scale, (1, config.num_key_value_heads, 1, shape[axis]))
        return _LayerCache(name, old, axis, scale, scales)

    def _plain(self, cache: _LayerCache) -> Value:
        """The cache as numbers; an int8 one without its scales, which are multiplied in later.

        A cast, because the CPU delegate takes DEQUANTIZE in front of a matrix product for
        something else and asks for positions squared of memory.
        """
        if cache.scales is None:
            return cache.held
        return self.graph.cast(cache.held, np.float32)

    def _remember(self, cache: _LayerCache, rows: Value) -> Value:
        """`f32[1, KV, T, H]`: sets what will be written; returns it as later calls will see it, in
        the cache's order."""
        graph, turn = self.graph, (0, 1, 3, 2)
        if cache.scales is None:
            cache.new = rows if cache.axis == 2 else graph.transpose(rows, turn)
            return cache.new
        largest = graph.maximum(graph.max_last(graph.absolute(rows)), 1e-6)
        scales = graph.multiply(largest, 1 / _INT8_MAX)
        rows, cache.new_scales = graph.divide(rows, scales), graph.transpose(scales, turn)
        if cache.axis == 3:
            rows, scales = graph.transpose(rows, turn), cache.new_scales
        cache.new = graph.to_int8(rows)
        return graph.multiply(graph.cast(cache.new, np.float32), scales)

    def _write(self, cache: _LayerCache, ring: bool) -> None:
        """Puts this call's positions into the cache."""
        assert cache.new is not None
        graph = self.graph
        if ring and not self.writes_first:
            cache.held = self._write_ring(cache.held, cache.new, cache.axis)
            return
        slot = self.positions.start
        if ring:
            slot = graph.floor_mod(slot, np.int32(self.positions.ring))
        axes = np.eye(4, dtype=np.int32)
        at = graph.multiply(slot, axes[cache.axis])
        cache.held = graph.update_slice(cache.held, cache.new, at)
        if cache.scales is not None and cache.new_scales is not None:
            at = graph.multiply(slot, axes[3])
            cache.scales = graph.update_slice(cache.scales, cache.new_scales, at)

    def _write_ring(self, old: Value, new: Value, axis: int) -> Value:
        """Many positions at once: each slot takes the last real one that belongs to it, if any.

        They are moved by a matrix of zeros and ones, which is exact, and which the CPU delegate
        can do, as it cannot gather.
        """
        graph = self.graph
        takes, keeps = self.positions.ring_update
        if axis == 2:
            taken = graph.matmul(takes, new)
        else:
            taken = graph.matmul(new, takes, transpose_b=True)
            keeps = graph.transpose(keeps, (0, 1, 3, 2))
        # what depends on inputs alone runs first, for all layers at once, and takes 16 MB: wait
        wait = graph.multiply(graph.slice(taken, 5 - axis, 0, 1), 0.0)
        return graph.add(taken, graph.multiply(graph.add(keeps, wait), old))
