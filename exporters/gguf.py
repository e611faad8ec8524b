"""`.gguf`: the file that llama.cpp and what is built on it load.

Design choices:
- Nothing is quantised again. int4 in groups of 32 is Q4_0, and int8 Q8_0, with the same codes and
  scales; larger groups repeat theirs, and a row's one scale stands in each of its blocks. What has
  no such form (a scale that float16 does not hold, a zero point) is refused by name.
- The metadata are those of llama.cpp's own converter, so norms are `1 + w` in float32, the spaces
  of added pieces are spelled as spaces, and reserved pieces are control pieces. Pieces without a
  row in the embedding are left out, and rows without a piece get one that no text makes.
- llama.cpp computes what its code for the architecture says, whatever else a config says: a query
  scale or an embedding scale of another kind is refused. (A residual scale changes no result.)
- What GGUF has no key for is in keys of ours, so that a file opens as the checkpoint it was.
- Tensors are made a few thousand rows at a time, as they are written.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Provenance, Tensor, dense, rows_of
from gemma_multi.config import EMBEDDING, SLIDING, ModelConfig, alternate
from gemma_multi.errors import CheckpointError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.files import begins_with, read_optional_json, renamed_when_whole
from gemma_multi.formats.directory import CHAT_TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from gemma_multi.formats.gguf import layout
from gemma_multi.formats.gguf.file import MAGIC, GgufFile
from gemma_multi.formats.gguf.tensors import BITS, DTYPES, gain_of, norm_of
from gemma_multi.hub import is_repository_id
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.quantization.int4 import GROUP_SIZE
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.sampling import GenerationOptions
from gemma_multi.sentencepiece_model import SPACE, UNKNOWN, PieceKind, with_silent_steering_pieces
from gemma_multi.transforms import DENSE, GRIDS, to_precision, without_sfp8

_CHUNK_ROWS = 1 << 12
_PAD_SCORE = -1000.0
# As Google's: turns are trimmed, system text is not and stands in the first user's turn. (No filter
# is mapped and no macro called, of which llama.cpp's own engine lacks some.)
_TEMPLATE = """\
{{ bos_token }}
{%- set ns = namespace(system="") -%}
{%- for message in messages -%}
{%- if message.role == "system" or message.role == "developer" -%}
{%- set text = message.content if message.content is string else message.content[0].text -%}
{%- set ns.system = text + "\\n\\n" -%}
{%- else -%}
{{ "<start_of_turn>" + ("model" if message.role == "assistant" else message.role) + "\\n" }}
{{- ns.system -}}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{{ "<end_of_turn>\\n" }}
{%- set ns.system = "" -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\\n" }}{%- endif -%}
"""


@dataclass(frozen=True)
class GgufOptions:
    precision: str = option("auto", "int4, int8, bfloat16, float16, float32, or auto: as stored.")


def _write(
    checkpoint: Checkpoint, output: Path, options: GgufOptions, progress: Report
) -> ExportReport:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    _check_config(checkpoint.config)
    checkpoint = without_sfp8(checkpoint, options.precision)
    precision, parameters = options.precision, checkpoint.config.num_parameters
    dense = precision if precision in DENSE and precision != checkpoint.precision else None
    done = parameters if precision in GRIDS and precision != checkpoint.precision else 0
    total = done + parameters
    if dense is None:  # else row by row, as they are written
        checkpoint = to_precision(checkpoint, precision, lambda some, _: progress(some, total))
    infos, shapes = checkpoint.tensors.infos, checkpoint.config.tensor_shapes()
    matrices = {
        name: layout.KIND_OF[dense or infos[name].dtype]
        for name, shape in shapes.items() if len(shape) == 2
    }  # fmt: skip
    how = "exported as GGUF in " + ", ".join(sorted(set(matrices.values())))
    provenance = checkpoint.provenance.modified(how)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        renamed_when_whole(output) as target,
        closing(GGUFWriter(target, layout.ARCHITECTURE)) as writer,
    ):
        for key, value in _metadata(checkpoint, provenance, matrices).items():
            _add(writer, key, value)
        sizes = {}
        for name, shape in shapes.items():
            kind = GGMLQuantizationType[matrices.get(name, "F32")]
            block, nbytes = GGML_QUANT_SIZES[kind]
            sizes[name] = math.prod(shape) // block * nbytes
            writer.add_tensor_info(
                layout.stored_name(name), shape, np.float32, sizes[name], raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, shape in shapes.items():
            parts = _stored(name, checkpoint.tensors[name], matrices.get(name, "F32"))
            writer.write_tensor_data(_Streamed(sizes[name], parts))
            done += math.prod(shape)
            progress(done, total)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    return ExportReport(
        output, output.stat().st_size, EXPORTER.format, dense or checkpoint.precision,
        checkpoint.config.max_position_embeddings,
    )  # fmt: skip


def _check_config(config: ModelConfig) -> None:
    """Refuses what llama.cpp would compute otherwise, and no key could tell it."""
    scalar = layout.query_scalar(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.head_dim
    )
    if config.query_pre_attn_scalar != scalar:
        raise CheckpointError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar!r}, but llama.cpp computes "
            f"with {scalar} for this shape, and a GGUF file cannot say otherwise; use another "
            "format"
        )
    if not config.is_scaled_by_root:
        raise CheckpointError(
            f"embedding_scale is {config.embedding_scale!r}, but llama.cpp multiplies by "
            f"{config.hidden_size**0.5:.6g}, and a GGUF file cannot say otherwise; use another "
            "format"
        )


# metadata


def _metadata(
    checkpoint: Checkpoint, provenance: Provenance, matrices: Mapping[str, str]
) -> dict[str, Any]:
    """Every key of the file but the architecture, which the writer has. `matrices` says what each
    is stored as."""
    import gguf

    source, config = provenance.source, checkpoint.config
    linear = Counter(kind for name, kind in matrices.items() if name != EMBEDDING)
    ((most, _),) = linear.most_common(1)
    file_type = gguf.LlamaFileType[f"{'ALL' if most == 'F32' else 'MOSTLY'}_{most}"]
    sampling = GenerationOptions.merge(checkpoint.generation, {})
    own = config.dtype, config.embedding_scale, config.residual_scale, config.eos_token_ids
    entries = {
        "general.type": "model",
        "general.name": source.rsplit("/", 1)[-1],
        "general.license": provenance.license,
        "general.license.link": provenance.license_link,
        "general.file_type": int(file_type),
        "general.sampling.temp": float(sampling.temperature),
        "general.sampling.top_k": sampling.top_k,
        "general.sampling.top_p": float(sampling.top_p),
        "general.sampling.min_p": float(sampling.min_p),
        "general.sampling.penalty_repeat": float(sampling.repetition_penalty),
        **{f"{layout.ARCHITECTURE}.{key}": value for key, value in _shape(config).items()},
        **_tokenizer(checkpoint),
        layout.CHAT_TEMPLATE: _chat_template(checkpoint.path),
        layout.NOTICE: provenance.notice(),
        layout.PROVENANCE: provenance.to_json().decode(),
        layout.GENERATION: json.dumps(dict(checkpoint.generation)),
        layout.CONFIG: json.dumps(dict(zip(layout.OWN_FIELDS, own, strict=True))),
        **_norms(checkpoint),
    }
    if is_repository_id(source):
        entries[layout.REPOSITORY] = source
        entries["general.source.url"] = f"https://huggingface.co/{source}"
    if any(kind in BITS for kind in matrices.values()):
        entries["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return entries


def _shape(config: ModelConfig) -> dict[str, Any]:
    """What the architecture's own keys say."""
    entries: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        # llama.cpp ends the process on a window that no layer has
        "attention.sliding_window": config.sliding_window * (SLIDING in config.layer_types),
        "rope.freq_base": config.rope_theta,
    }
    if config.layer_types != alternate(config.num_hidden_layers, layout.GEMMA_PERIOD):
        entries[layout.PATTERN] = [kind == SLIDING for kind in config.layer_types]
    if config.rope_local_theta != layout.LOCAL_ROPE_BASE:
        entries["rope.freq_base_swa"] = config.rope_local_theta
    if config.rope_scaling_factor != 1:
        entries["rope.scaling.type"] = "linear"
        entries["rope.scaling.factor"] = config.rope_scaling_factor
    return entries


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """The vocabulary, and what its pieces are for. Raises CheckpointError for more stop ids than
    there are keys."""
    from sentencepiece import sentencepiece_model_pb2 as schema

    tokenizer, rows = checkpoint.tokenizer, checkpoint.config.vocab_size
    proto = schema.ModelProto.FromString(with_silent_steering_pieces(tokenizer.model))
    tokens, scores, kinds = [], [], []
    for entry in proto.pieces[:rows]:
        piece, kind = entry.piece, entry.type
        if kind == PieceKind.USER_DEFINED:
            if piece.startswith(layout.RESERVED):
                kind = PieceKind.CONTROL
            piece = piece.replace(SPACE, " ")
        tokens.append(piece)
        scores.append(entry.score)
        kinds.append(int(kind))
    missing = range(len(tokens), rows)
    tokens += [f"{layout.PAD_PIECE}{i}]" for i in missing]
    scores += [_PAD_SCORE] * len(missing)
    kinds += [int(PieceKind.UNUSED)] * len(missing)
    ends = {"eos": tokenizer.eos_id, "eot": tokenizer.end_of_turn_id}
    others = sorted(checkpoint.stop_ids - set(ends.values()))
    if len(others) > 1:
        raise CheckpointError(
            f"answers end at the tokens {others} besides <eos> and <end_of_turn>, but a GGUF file "
            "names one more; take the others out of eos_token_id"
        )
    ids = {"bos": tokenizer.bos_id, **ends, "unknown": tokenizer.id(UNKNOWN),
           "padding": tokenizer.pad_id, **({"eom": others[0]} if others else {})}  # fmt: skip
    return {
        layout.TOKENIZER_MODEL: "llama",
        "tokenizer.ggml.pre": "default",
        layout.TOKENS: tokens,
        layout.SCORES: scores,
        layout.KINDS: kinds,
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()},
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _chat_template(path: Path | None) -> str:
    """The source's own in Jinja, which may know tools, or ours."""
    told: Any = None
    if path is not None and path.is_dir():
        told = read_optional_json(path / TOKENIZER_CONFIG_FILE).get("chat_template")
        if (file := path / CHAT_TEMPLATE_FILE).is_file():
            told = file.read_text(encoding="utf-8", errors="replace")
    elif path is not None and begins_with(path, MAGIC):
        told = GgufFile(path).metadata.get(layout.CHAT_TEMPLATE)
    return told if told and isinstance(told, str) else _TEMPLATE


def _norms(checkpoint: Checkpoint) -> dict[str, Any]:
    """The norms as they are, where `1 + w` in float32 would not give them back."""
    shapes = checkpoint.config.tensor_shapes()
    norms = [checkpoint.weight(name) for name, shape in shapes.items() if len(shape) == 1]
    again = (norm_of(gain_of(norm)) for norm in norms)
    pairs = zip(norms, again, strict=True)
    if all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs):
        return {}
    return {
        layout.NORMS: b"".join(norm.tobytes() for norm in norms),
        layout.NORM_TYPES: [norm.dtype.name for norm in norms],
    }


def _add(writer: Any, key: str, value: Any) -> None:
    """An entry in the type that llama.cpp expects of it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# tensors


@dataclass(frozen=True)
class _Streamed:
    """As much of an array as the writer asks for: its bytes come in parts."""

    nbytes: int
    parts: Iterable[np.ndarray]

    def tofile(self, file: Any) -> None:
        for part in self.parts:
            file.write(np.ascontiguousarray(part).view(np.uint8).data)


def _stored(name: str, tensor: Tensor, kind: str) -> Iterator[np.ndarray]:
    """A tensor as the file holds it, some rows at a time. Raises CheckpointError where it
    cannot."""
    if len(tensor.shape) == 1:
        yield gain_of(np.asarray(tensor))
        return
    for start in range(0, tensor.shape[0], _CHUNK_ROWS):
        rows = rows_of(tensor, slice(start, start + _CHUNK_ROWS))
        if isinstance(rows, QuantizedTensor) and kind in BITS:
            yield _blocks(name, rows, kind)
            continue
        with np.errstate(over="ignore"):
            stored = dense(rows).astype(DTYPES[kind])
        if kind == "F16" and not np.isfinite(stored).all():
            raise CheckpointError(
                f"tensor {name!r} holds numbers beyond float16's largest; give "
                "precision='bfloat16' or 'float32'"
            )
        yield stored


def _blocks(name: str, rows: QuantizedTensor, kind: str) -> np.ndarray:
    """Blocks of 32 weights, a float16 scale and its codes each: `u8[N, K / 32, nbytes]`."""
    scales, biases = rows.scales.astype(np.float32), rows.biases.astype(np.float32)
    with np.errstate(over="ignore"):
        held = scales.astype("<f2")
    fault = (
        f"groups of {rows.group_size} weights, no multiple of {GROUP_SIZE}"
        if rows.group_size % GROUP_SIZE
        else "a scale that float16 does not hold" if np.any(held.astype(np.float32) != scales)
        else "a zero point" if np.any(biases != scales * -(1 << (rows.bits - 1)))
        else ""
    )  # fmt: skip
    if fault:
        raise CheckpointError(
            f"tensor {name!r} has {fault}, for which {kind} has no place; give "
            "precision='float32', or quantize the original"
        )
    codes = rows.codes().reshape(len(scales), -1, GROUP_SIZE)
    held = np.repeat(held, rows.group_size // GROUP_SIZE, axis=1)
    if rows.bits == 8:  # offset by 128 -> two's complement
        codes = codes ^ np.uint8(0x80)
    else:  # the first half of a block in the low halves of its bytes, the second in the high ones
        codes = codes[..., : GROUP_SIZE // 2] | codes[..., GROUP_SIZE // 2 :] << 4
    return np.concatenate([held[..., None].view(np.uint8), codes], axis=-1)


EXPORTER = Exporter(format="gguf", options=GgufOptions, write=_write)
