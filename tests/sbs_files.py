""".sbs files for tests, written and read with nothing of ours: by gemma.cpp's source.

Its converter is the model: queries with keys and values in one matrix, gate with up, the output of
the attention by heads. What our exporter would never write, a file from here can have.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sfp8_by_the_words import TABLE, nearest

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.quantization.tensor import BFLOAT16

KINDS = {"F32": 1, "BF16": 2, "SFP": 3, "NUQ": 4}
SIZES = {"F32": 4, "BF16": 2, "SFP": 1, "NUQ": 1}
GEMMA3_270M = 18
_VALUES = np.array([float(TABLE.get(code, np.nan)) for code in range(256)])


def words(*values: Any) -> list[int]:
    """Numbers as they are, texts with their length in words in front, floats by their bits."""
    found: list[int] = []
    for value in values:
        if isinstance(value, str):
            data = value.encode() + bytes(-len(value) % 4)
            found += [len(data) // 4, *struct.unpack(f"<{len(data) // 4}I", data)]
        elif isinstance(value, float):
            found += struct.unpack("<I", struct.pack("<f", value))
        elif isinstance(value, list):
            found += value
        else:
            found.append(value)
    return found


def record(*values: Any) -> list[int]:
    held = words(*values)
    return [len(held), *held]


def encoded(weight: np.ndarray, kind: str) -> bytes:
    if kind == "SFP":
        flat = weight.astype(np.float32).ravel()
        known = {value: nearest(value) for value in np.unique(flat)}
        return bytes(known[value] for value in flat)
    return weight.astype(np.float32 if kind == "F32" else BFLOAT16).tobytes()


def converted(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The model's tensors as gemma.cpp's converter names and arranges them."""
    config = checkpoint.config
    h, d = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    found = {"c_embedding": checkpoint.weight("model.embed_tokens.weight"),
             "c_final_norm": checkpoint.weight("model.norm.weight")}  # fmt: skip
    for i in range(config.num_hidden_layers):

        def of(module: str, layer: int = i) -> np.ndarray:
            return checkpoint.weight(f"model.layers.{layer}.{module}.weight")

        turns = np.stack([of("self_attn.k_proj").reshape(kv, d, h),
                          of("self_attn.v_proj").reshape(kv, d, h)])  # fmt: skip
        found |= {
            f"qkv_ein_{i}": np.concatenate([
                of("self_attn.q_proj").reshape(heads, d, h),
                turns.transpose(1, 0, 2, 3).reshape(2 * kv, d, h),
            ]).reshape(-1, h),
            f"att_ein_{i}": of("self_attn.o_proj").reshape(h, heads, d).transpose(1, 0, 2)
            .reshape(-1, d),
            f"gating_ein_{i}": np.concatenate([of("mlp.gate_proj"), of("mlp.up_proj")]),
            f"linear_w_{i}": of("mlp.down_proj"),
            f"pre_att_ns_{i}": of("input_layernorm"),
            f"post_att_ns_{i}": of("post_attention_layernorm"),
            f"pre_ff_ns_{i}": of("pre_feedforward_layernorm"),
            f"post_ff_ns_{i}": of("post_feedforward_layernorm"),
            f"query_norm_{i}": of("self_attn.q_norm"),
            f"key_norm_{i}": of("self_attn.k_norm"),
        }  # fmt: skip
    return found


def config_words(checkpoint: Checkpoint, **changes: Any) -> list[int]:
    """The blob `config`, its fields in gemma.cpp's order."""
    config = checkpoint.config
    layer = {"model_dim": config.hidden_size, "griffin": 0, "ff": config.intermediate_size,
             "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
             "qkv_dim": config.head_dim, "conv1d": 0, "ff_biases": 0, "softmax_biases": 0,
             "optimized_gating": 1, "post_norm": 1, "type": 0, "activation": 0, "post_qk": 0,
             "use_qk_norm": 1}  # fmt: skip
    layer.update({name: changes.pop(name) for name in list(changes) if name in layer})
    layers, longest = config.num_hidden_layers, config.max_position_embeddings
    windows = [config.sliding_window if config.is_sliding(i) else longest for i in range(layers)]
    values: dict[str, Any] = {
        "family": 1, "name": "Gemma3_270M", "model": GEMMA3_270M, "wrapping": 0, "weight": 3,
        "num_layers": layers, "hidden": config.hidden_size, "vocab_size": config.vocab_size,
        "max_seq_len": longest, "num_scales": 0, "att_cap": 0.0, "final_cap": 0.0,
        "absolute_pe": 0, "local_attention": 0, "query_scale": 0,
        "layers": [layers, *record(*layer.values()) * layers], "windows": [layers, *windows],
        "norm_num_groups": 1, "vit": record(0, 0, 0, 14, 224, 0, 1), "pool_dim": 1,
        "eos_id": 1, "secondary_eos_id": 106,
        "scale_names": [2, *words("att_ein", "qkv_ein")],
    }  # fmt: skip
    return record(*{**values, **changes}.values())


def write_sbs(
    checkpoint: Checkpoint, path: Path, kind: str = "SFP", *, version: int = 2,
    without: Sequence[str] = (), kinds: Mapping[str, str] | None = None,
    extra: Mapping[str, np.ndarray] | None = None, scales: Mapping[str, float] | None = None,
    data: Mapping[str, bytes] | None = None, **config: Any,
) -> Path:  # fmt: skip
    """A file as gemma.cpp's converter makes it: the embedding in BF16, matrices in `kind`."""
    blobs: dict[str, bytes] = {}
    table: list[int] = []
    for name, weight in {**converted(checkpoint), **(extra or {})}.items():
        if name in without:
            continue
        held = (kinds or {}).get(name, "BF16" if weight.ndim == 1 or name[0] == "c" else kind)
        rows, cols = (1, *weight.shape)[-2:]
        scale = float((scales or {}).get(name, 1.0))
        table += record(name, KINDS[held], SIZES[held], rows * cols, rows, cols, scale, cols)
        blobs[name] = encoded(weight, held)
    for name, values in (("config", config_words(checkpoint, **config)), ("toc", table)):
        blobs[name] = struct.pack(f"<{len(values)}I", *values)
    blobs["tokenizer"] = checkpoint.tokenizer.model
    blobs = {name: blob for name, blob in blobs.items() if name not in without}
    path.write_bytes(container({**blobs, **(data or {})}, version))
    return path


def container(blobs: Mapping[str, bytes], version: int) -> bytes:
    keys = b"".join(name.encode().ljust(16, b"\0") for name in blobs)
    begin = 16 + 32 * len(blobs) if version == 1 else 16
    at, spans, payload = begin + -begin % 256, b"", b""
    first = at
    for blob in blobs.values():
        spans += struct.pack("<QQ", at, len(blob))
        payload += blob + bytes(-len(blob) % 256)
        at += len(blob) + -len(blob) % 256
    directory = keys + spans
    if version == 1:
        size = at + -at % 65536
        head = struct.pack("<4sIQ", b"SBS\n", len(blobs), size) + directory
        return (head.ljust(first, b"\0") + payload).ljust(size, b"\0")
    size = at + len(directory) + 16
    size += -size % 65536
    head = struct.pack("<4sIQ", b"SBS\n", 0, 65536).ljust(256, b"\0")
    tail = directory + struct.pack("<4sIQ", b"SBS\n", len(blobs), size)
    return (head + payload).ljust(size - len(tail), b"\0") + tail


def blobs_of(path: Path) -> dict[str, bytes]:
    """A file's blobs, by the directory at its end."""
    data = path.read_bytes()
    magic, count, size = struct.unpack("<4sIQ", data[-16:])
    assert (magic, size, size % 65536) == (b"SBS\n", len(data), 0)
    assert data[:16] == struct.pack("<4sIQ", b"SBS\n", 0, 65536)
    directory, found, expected = data[-16 - 32 * count : -16], {}, 256
    for i in range(count):
        name = directory[16 * i : 16 * i + 16].rstrip(b"\0").decode()
        offset, length = struct.unpack_from("<QQ", directory, 16 * (count + i))
        assert offset == expected
        expected = offset + length + -length % 256
        found[name] = data[offset : offset + length]
    assert expected <= size - 16 - 32 * count
    return found


def table_of(blobs: Mapping[str, bytes]) -> dict[str, tuple[str, np.ndarray]]:
    """(kind, the numbers that it stands for) of every tensor in the table."""
    table = struct.unpack(f"<{len(blobs['toc']) // 4}I", blobs["toc"])
    found, at = {}, 0
    while at < len(table):
        count, length = table[at], table[at + 1]
        name = struct.pack(f"<{length}I", *table[at + 2 : at + 2 + length]).rstrip(b"\0").decode()
        kind, size, elements, rows, cols, scale, stride = table[at + 2 + length : at + 1 + count]
        assert (elements, stride) == (rows * cols, cols)
        which = {number: known for known, number in KINDS.items()}[kind]
        assert size == SIZES[which]
        raw = blobs[name]
        dtype = {"F32": np.dtype("<f4"), "BF16": BFLOAT16, "SFP": np.dtype(np.uint8)}[which]
        held = np.frombuffer(raw, dtype).reshape(rows, cols)
        values = _VALUES[held] if which == "SFP" else held.astype(np.float64)
        found[name] = which, values * struct.unpack("<f", struct.pack("<I", scale))[0]
        at += count + 1
    return found
