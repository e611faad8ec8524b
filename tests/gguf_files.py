"""GGUF files for tests, written and read by the gguf package.

llama.cpp's converter is the model: norms as `1 + w`, the spaces of added pieces spelled as spaces,
reserved pieces as control pieces. What our exporter would never write, a file from here can have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tiny import tiny_checkpoint

import gemma_multi
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.formats.gguf.layout import stored_name
from gemma_multi.quantization.tensor import BFLOAT16
from gemma_multi.sentencepiece_model import SPACE
from gemma_multi.tokenizer import Tokenizer

USER_DEFINED = 4


def speaking(**changes: Any) -> Checkpoint:
    """With a row for each piece of its tokenizer, and norms in bfloat16 as Gemma's are."""
    checkpoint = tiny_checkpoint(vocab_size=4096, **changes)
    return checkpoint.with_tensors(
        {n: t.astype(BFLOAT16) for n, t in checkpoint.tensors.items() if t.ndim == 1}
    )


def export(checkpoint: Any, path: Path, **options: Any) -> Checkpoint:
    """What a file opens as that our exporter wrote."""
    gemma_multi.export(checkpoint, path, progress=False, **options)
    return gemma_multi.open_checkpoint(path)


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as the gguf package reads and dequantises it."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(
            [int(n) for n in t.shape[::-1]]
        )
        for t in gguf.GGUFReader(path).tensors
    }  # fmt: skip


def entries(path: Path) -> dict[str, Any]:
    """The metadata as the gguf package reads them."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def metadata_of(checkpoint: Checkpoint) -> dict[str, Any]:
    c = checkpoint.config
    return {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.sliding_window": c.sliding_window,
        "rope.freq_base": c.rope_theta,
    }


def write_gguf(
    checkpoint: Checkpoint, path: Path, kind: Kind | Callable[[str], Kind] = Kind.F32, *,
    architecture: str = "gemma3", tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None, without: tuple[str, ...] = (),
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    """`kind` is that of the matrices, or says it by name; `without` and `extra` are GGUF's names
    of tensors; a value of None in `metadata` leaves a key out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "Tiny")
    writer.add_string("general.license", "apache-2.0")
    for key, value in {**metadata_of(checkpoint), **(metadata or {})}.items():
        name = key if key.startswith(("general.", "tokenizer.", "split.")) else f"gemma3.{key}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    _add_tokenizer(writer, tokenizer or checkpoint.tokenizer)
    for name in checkpoint.config.tensor_shapes():
        weight = checkpoint.weight(name).astype(np.float32)
        if stored_name(name) not in without:
            of = kind if isinstance(kind, Kind) else kind(name)
            _add_tensor(writer, stored_name(name), weight, of)
    for name, array in (extra or {}).items():
        _add_tensor(writer, name, array, Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: Kind) -> None:
    if weight.ndim == 1:
        writer.add_tensor(name, 1 + weight)
    elif kind == Kind.F32:
        writer.add_tensor(name, weight)
    else:
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    from sentencepiece import sentencepiece_model_pb2 as schema

    entries = schema.ModelProto.FromString(tokenizer.model).pieces
    writer.add_tokenizer_model("llama")
    writer.add_token_list([
        (e.piece.replace(SPACE, " ") if e.type == USER_DEFINED else e.piece).encode()
        for e in entries
    ])  # fmt: skip
    writer.add_token_scores([e.score for e in entries])
    control = ("<unused", "<unk>")  # as llama.cpp's converter calls both
    writer.add_token_types([3 if e.piece.startswith(control) else e.type for e in entries])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
