"""Gemma 3's decoder in ONNX operators, with the inputs and outputs that Transformers.js knows.

Design choices:
- GroupQueryAttention does what is between the norms of queries and keys and the output projection:
  it turns by position, which it counts itself, keeps the window and adds to the caches. The query
  scale is in the gain of the query norm, so that float16 scores are small from the start.
- It takes rows of unequal length padded on the right; generators pad on the left. So the ids of a
  first call are moved to the front of their row, and the last states back: exact, and on a row
  without padding nothing moves. Later calls that pad need one token a row.
- The tables of angles take 1 MB for every 1,000 positions, once for each kind of layer. The file
  holds two small ones, from which onnxruntime makes the whole as it folds constants, once: cosine
  and sine of a sum. They are right to float32's last bits at every position, where an angle
  multiplied out in float32 is 0.001 off at 16,000.
- `num_logits_to_keep` takes the last rows before the head, 0 for all.
- Sums of norms are float32 whatever the activations are (`stash_type`). In float32 the stream is
  added to and normed by one operator, which has no such choice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.exporters.onnx.graph import MICROSOFT, Graph
from gemma_multi.exporters.onnx.weights import Linear

_STEP = 128  # positions from row to row of the coarse table of angles
_BATCH, _NEW, _PAST, _ALL = (
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length",
)  # fmt: skip


class DecoderWriter:
    """Writes one model into a graph. Activations are `dtype`, logits float32."""

    def __init__(
        self, graph: Graph, config: ModelConfig, dtype: np.dtype, context_length: int,
        linear: Mapping[str, Linear], gains: Mapping[str, np.ndarray],
    ) -> None:  # fmt: skip
        """`gains` are the norms' tensors, `1 + w`."""
        self.graph, self.config, self.dtype, self.linear = graph, config, dtype, linear
        self.gains, self.length = gains, context_length
        self._tables: dict[bool, tuple[str, str]] = {}

    def write(self) -> None:
        graph, config = self.graph, self.config
        ids = graph.input("input_ids", np.int64, [_BATCH, _NEW])
        mask = graph.input("attention_mask", np.int64, [_BATCH, _ALL])
        kept = graph.input("num_logits_to_keep", np.int64, [])
        self._read_mask(ids, mask)
        moved = graph.op("GatherElements", ids, self._turn("Add"), axis=1)
        x = self.linear[EMBEDDING].look_up(graph, moved)
        x = graph.op("Mul", x, graph.constant(config.stream_scale, self.dtype))
        more = ""
        for i in range(config.num_hidden_layers):
            x, more = self._layer(i, x, more)
        x = graph.op("Add", x, more)
        rows = graph.op("Reshape", x, graph.constant([-1, config.hidden_size]))
        last = graph.op("Gather", rows, self._rows_to_keep(kept))
        last = self._norm(last, "model.norm.weight")
        logits = self.linear[EMBEDDING].multiply_rows(graph, last)
        if self.dtype != np.float32:
            logits = graph.op("Cast", logits, to=TensorProto.FLOAT)
        batch = graph.op("Shape", ids, end=1)
        shape = graph.op("Concat", batch, graph.constant([-1, config.vocab_size]), axis=0)
        logits = graph.op("Reshape", logits, shape, name="logits")
        graph.output(logits, np.float32, [_BATCH, "num_logits", config.vocab_size])
        for i in range(config.num_hidden_layers):
            for which in ("key", "value"):
                graph.output(f"present.{i}.{which}", self.dtype, self._cache_shape(_ALL))

    # positions

    def _read_mask(self, ids: str, mask: str) -> None:
        """What GroupQueryAttention must know of every row, and how far each is padded."""
        graph = self.graph
        narrow = graph.op("Cast", mask, to=TensorProto.INT32)
        lengths = graph.op("ReduceSum", narrow, graph.constant([1]), keepdims=0)
        self.last_position = graph.op("Sub", lengths, graph.constant(1, np.int32))
        new, held = graph.op("Shape", ids, start=1), graph.op("Shape", mask, start=1)
        self.total = graph.op("Cast", held, to=TensorProto.INT32)
        self.new = graph.op("Squeeze", new)
        self.order = graph.op("Range", graph.constant(0), self.new, graph.constant(1))
        padded = graph.op("ArgMax", narrow, axis=1, keepdims=1)
        first = graph.op("Equal", new, held)
        self.padded = graph.op("Where", first, padded, graph.constant([0]))

    def _turn(self, which: str) -> str:
        """For each place the one it takes its value from, `[batch, sequence]`: "Add" moves rows to
        the front by their padding, "Sub" back."""
        graph = self.graph
        ahead = graph.op("Add", self.order, self.new)  # that no difference is below zero
        return graph.op("Mod", graph.op(which, ahead, self.padded), self.new)

    def _rows_to_keep(self, kept: str) -> str:
        """The places of the last tokens of every row, in all rows laid end to end."""
        graph = self.graph
        places = self._turn("Sub")
        start = graph.op("Unsqueeze", graph.op("Neg", kept), graph.constant([0]))
        end = graph.constant([np.iinfo(np.int64).max])
        places = graph.op("Slice", places, start, end, graph.constant([1]))
        batch = graph.op("Squeeze", graph.op("Shape", places, end=1))
        rows = graph.op("Range", graph.constant(0), batch, graph.constant(1))
        rows = graph.op("Unsqueeze", graph.op("Mul", rows, self.new), graph.constant([1]))
        return graph.op("Reshape", graph.op("Add", places, rows), graph.constant([-1]))

    def _angles(self, sliding: bool) -> tuple[str, str]:
        """Tables of cosines and sines, `[positions, head_dim / 2]`."""
        if sliding in self._tables:
            return self._tables[sliding]
        graph, config, half = self.graph, self.config, self.config.head_dim // 2
        theta = config.rope_local_theta if sliding else config.rope_theta
        factor = 1.0 if sliding else config.rope_scaling_factor
        speed = theta ** (-np.arange(half) / half) / factor
        name = "rotary.local" if sliding else "rotary.global"
        parts: dict[tuple[str, np.ufunc], str] = {}
        steps = np.arange(-(-self.length // _STEP))[:, None] * _STEP
        for part, positions, axis in (("far", steps, 1), ("near", np.arange(_STEP)[:, None], 0)):
            for function in (np.cos, np.sin):
                table = np.expand_dims(function(positions * speed), axis)
                label = f"{name}.{part}.{function.__name__}"
                parts[part, function] = graph.constant(table, np.float32, label)

        def product(far: np.ufunc, near: np.ufunc) -> str:
            return graph.op("Mul", parts["far", far], parts["near", near])

        cos = graph.op("Sub", product(np.cos, np.cos), product(np.sin, np.sin))
        sin = graph.op("Add", product(np.sin, np.cos), product(np.cos, np.sin))
        self._tables[sliding] = (self._table(cos), self._table(sin))
        return self._tables[sliding]

    def _table(self, values: str) -> str:
        graph = self.graph
        table = graph.op("Reshape", values, graph.constant([-1, self.config.head_dim // 2]))
        if self.dtype != np.float32:
            table = graph.op("Cast", table, to=TensorProto.FLOAT16)
        return table

    # layers

    def _layer(self, i: int, x: str, more: str) -> tuple[str, str]:
        """The stream behind the attention, and what the rest of the layer adds to it; of the stream
        and what the layer before adds."""
        graph, name = self.graph, f"model.layers.{i}.{{}}.weight".format
        x, h = self._add_and_norm(x, more, name("input_layernorm"))
        h = self._norm(self._attention(i, h), name("post_attention_layernorm"))
        x, h = self._add_and_norm(x, h, name("pre_feedforward_layernorm"))
        gate = self._multiply(h, name("mlp.gate_proj"))
        up = self._multiply(h, name("mlp.up_proj"))
        gate = graph.op("FastGelu", gate, domain=MICROSOFT)  # the tanh form
        h = self._multiply(graph.op("Mul", gate, up), name("mlp.down_proj"))
        return x, self._norm(h, name("post_feedforward_layernorm"))

    def _attention(self, i: int, h: str) -> str:
        graph, config = self.graph, self.config
        name = f"model.layers.{i}.self_attn.{{}}.weight".format
        q, k, v = (self._multiply(h, name(f"{one}_proj")) for one in "qkv")
        q = self._heads_norm(q, name("q_norm"), config.num_attention_heads, config.query_scale)
        k = self._heads_norm(k, name("k_norm"), config.num_key_value_heads)
        past = [
            graph.input(f"past_key_values.{i}.{which}", self.dtype, self._cache_shape(_PAST))
            for which in ("key", "value")
        ]
        sliding = config.is_sliding(i)
        mixed, _, _ = graph.node(
            "GroupQueryAttention",
            [q, k, v, *past, self.last_position, self.total, *self._angles(sliding)],
            [f"attended.{i}", f"present.{i}.key", f"present.{i}.value"],
            domain=MICROSOFT, num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads, scale=1.0, do_rotary=1, rotary_interleaved=0,
            local_window_size=config.sliding_window if sliding else -1,
        )  # fmt: skip
        return self._multiply(mixed, name("o_proj"))

    def _cache_shape(self, positions: str) -> list[int | str]:
        return [_BATCH, self.config.num_key_value_heads, positions, self.config.head_dim]

    def _multiply(self, x: str, name: str) -> str:
        return self.linear[name].multiply(self.graph, x)

    def _heads_norm(self, x: str, name: str, heads: int, scale: float = 1.0) -> str:
        """The norm of every head of its own, times `scale`."""
        graph, width = self.graph, self.config.head_dim
        x = graph.op("Reshape", x, graph.constant([0, 0, heads, width]))
        x = self._norm(x, name, scale)
        return graph.op("Reshape", x, graph.constant([0, 0, heads * width]))

    def _add_and_norm(self, x: str, more: str, name: str) -> tuple[str, str]:
        """`x + more`, or `x` where there is no more, and its norm."""
        if not more:
            return x, self._norm(x, name)
        if self.dtype != np.float32:
            x = self.graph.op("Add", x, more)
            return x, self._norm(x, name)
        normed, *_, x = self.graph.node(
            "SkipSimplifiedLayerNormalization", [x, more, self._gain(name)],
            [f"{name}.normed", "", "", f"{name}.stream"], domain=MICROSOFT,
            epsilon=float(self.config.norm_eps(name)),
        )  # fmt: skip
        return x, normed

    def _norm(self, x: str, name: str, scale: float = 1.0) -> str:
        """RMS norm over the last axis, times `scale`: by onnxruntime's own operator, which it keeps
        among ONNX's, and builds have that are older than ONNX's RMSNormalization."""
        return self.graph.op(
            "SimplifiedLayerNormalization", x, self._gain(name, scale), axis=-1,
            epsilon=float(self.config.norm_eps(name)), stash_type=1,
        )  # fmt: skip

    def _gain(self, name: str, scale: float = 1.0) -> str:
        scale *= self.config.norm_gain(name)
        return self.graph.constant(self.gains[name] * np.float32(scale), self.dtype, name)
