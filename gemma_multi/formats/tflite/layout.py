"""Names and constants of the LiteRT files we write and read. One place; exporters import them.

A `.tflite` of ours is one decoder with these signatures, each of which updates the caches:

- `prefill_N`: reads N tokens, gives nothing else. Several sizes.
- `decode`: reads one token, gives `logits` `f32[1, 1, V]`.
- `hidden`: reads one token, gives the last hidden state `hidden` `f32[1, 1, D]`, without the head.
- `batch_N`: reads one token of each of N conversations, gives the `logits` `f32[1, N, V]` of each.
  Only in files that are asked for it; the caches of row 0 end in `_row_0`, and so on.
- `score`: reads `SCORE_TOKENS` tokens, gives the `logits` after each of them.
- `trace_N`: reads N tokens, gives the `hidden_states` of each, those of the embedding, of every
  layer and of the last norm in a row. Only in files made to look for a fault.

Inputs are `tokens` `i32[1, N]`, `input_pos` `i32[N]` and the caches (`cache_shapes`). Rows of
padding come last and have position 0. These are the names and rules of the LiteRT-LM engine, which
needs the first two kinds of signature and passes over the others.
"""

from __future__ import annotations

from gemma_multi.config import EMBEDDING, ModelConfig

FORMAT_VERSION = 2  # of all that follows; a released file of another number is refused
PREFILL, DECODE, HIDDEN, SCORE = "prefill_{}", "decode", "hidden", "score"
BATCH = "batch_{}"
TRACE, HIDDEN_STATES = "trace_{}", "hidden_states"
TOKENS, POSITIONS, LOGITS, HIDDEN_STATE = "tokens", "input_pos", "logits", "hidden"
SCORE_TOKENS = 16

# Positions of a ring beyond the window: so many tokens can be taken back when the ring is full,
# as an engine does that cancels an answer or guesses tokens ahead.
RING_SPARE = 16

# metadata of the flatbuffer
METADATA, NORMS, TOKENIZER = "gemma_multi", "gemma_multi.norms", "gemma_multi.tokenizer"
# after the flatbuffer: this mark, and the SHA-256 of all before the mark
TRAILER_MARK = b"gemma_multi sha256 "
TRAILER_SIZE = len(TRAILER_MARK) + 32

# Codes are two's complement here and offset in our layout, which is one bit of each code; the
# masks are for a byte, which holds two int4 codes.
INT4_SIGN_BITS, INT8_SIGN_BIT = 0x88, 0x80

CACHE_TYPES = ("float32", "int8")
# of the linear layers in what reads prompts: those of the other signatures, or int8 rows beside
PREFILL_PRECISIONS = ("same", "int8")
BATCH_SIZES = (2, 4, 8)  # conversations


def cache_names(layer: int) -> tuple[str, str]:
    """The key and the value cache of a layer."""
    return f"kv_cache_k_{layer}", f"kv_cache_v_{layer}"


def cache_scale_names(layer: int) -> tuple[str, str]:
    """Where a layer's caches are int8: the scale of each row, `f32[1, KV, 1, positions]`."""
    return f"kv_cache_k_scale_{layer}", f"kv_cache_v_scale_{layer}"


def of_row(name: str, row: int) -> str:
    """A cache of one conversation of a batch."""
    return f"{name}_row_{row}"


def batch_sizes(rows: int) -> tuple[int, ...]:
    """The batches of a file that reads so many conversations in one call."""
    return tuple(size for size in BATCH_SIZES if size <= rows)


def cache_positions(config: ModelConfig, layer: int, context_length: int) -> int:
    """Positions a layer keeps: a global layer all, a sliding one a ring."""
    return ring_positions(config, context_length) if config.is_sliding(layer) else context_length


def cache_shapes(
    config: ModelConfig, layer: int, context_length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a layer's keys, `[1, KV, positions, H]`, and values, `[1, KV, H, positions]`.

    For one query, either is then the left side of a matrix product, which XNNPACK reads where it
    lies. A right side it copies first into an order of its own, in every step: that took half of
    a step's time at 32,768 positions, and a seventh at 1,024.
    """
    heads, width = config.num_key_value_heads, config.head_dim
    positions = cache_positions(config, layer, context_length)
    return (1, heads, positions, width), (1, heads, width, positions)


def ring_positions(config: ModelConfig, context_length: int) -> int:
    """A sliding layer's window and a little more, where the context is longer."""
    return min(config.sliding_window + RING_SPARE, context_length)


# How the file groups the linear layers: weights that read the same input lie in one tensor, row
# after row, which is one multiplication instead of two or three.
FUSED = {
    "self_attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


QUERY_KEY_NORM = "self_attn.qk_norm"  # the query norm's factors (and scale), then the key norm's


def gain_name(norm: str) -> str:
    """A norm's factors, 1 + w, as a constant of the graph."""
    return norm.replace(".weight", ".gain")


def fused_tensors(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every linear tensor of the file: its name -> the names of the model's tensors in it."""
    tensors: dict[str, tuple[str, ...]] = {EMBEDDING: (EMBEDDING,)}
    for i in range(config.num_hidden_layers):
        for fused, parts in FUSED.items():
            names = tuple(f"model.layers.{i}.{part}.weight" for part in parts)
            tensors[f"model.layers.{i}.{fused}.weight"] = names
    return tensors
