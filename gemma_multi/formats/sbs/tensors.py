"""An .sbs file's tensors in the forms this package holds, each made when it is asked for.

| stored | becomes |
| --- | --- |
| F32, BF16 | the same, a view of the mapped file; float32 where the tensor has a scale |
| SFP | `Sfp8Tensor`, the same codes and scale |

gemma.cpp keeps some matrices in one: queries with keys and values, the latter two in turns head by
head, and gate with up. Of each it reads two layouts, the joined one and one that it makes of it as
it loads; both are read here. Norms are `w`, as in Hugging Face.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gemma_multi.checkpoint import Origin, Tensor, TensorInfo, Tensors
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.files import file_stamp
from gemma_multi.formats.sbs import fields
from gemma_multi.formats.sbs.fields import Record, Words
from gemma_multi.formats.sbs.file import KEY_BYTES, SbsFile
from gemma_multi.formats.sbs.layout import KINDS, TABLE
from gemma_multi.quantization.sfp8 import RESERVED
from gemma_multi.quantization.tensor import BFLOAT16, SFP8, Sfp8Tensor
from gemma_multi.safetensors_file import check_finite

DTYPES = {"F32": np.dtype("<f4"), "BF16": BFLOAT16, "SFP": np.dtype(np.uint8)}
_LARGEST_SCALE = 2.0**100
_CHUNK = 1 << 24
_NORMS = {
    "input_layernorm": "pre_att_ns",
    "post_attention_layernorm": "post_att_ns",
    "pre_feedforward_layernorm": "pre_ff_ns",
    "post_feedforward_layernorm": "post_ff_ns",
    "self_attn.q_norm": "query_norm",
    "self_attn.k_norm": "key_norm",
}
Arrange = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SbsTensor:
    """A tensor as it lies in the file."""

    name: str
    kind: str  # "F32", "BF16" or "SFP"
    shape: tuple[int, int]
    scale: float
    data: np.ndarray  # [rows, cols] of the kind's type, a view


@dataclass(frozen=True)
class Location:
    """Where a tensor of the model is: a stored one, its shape, and how to take it from there."""

    name: str
    shape: tuple[int, int]
    take: Arrange


def write_entry(name: str, kind: str, shape: tuple[int, int], scale: float) -> Words:
    """A tensor's record in the table."""
    rows, cols = shape
    return fields.record(
        fields.text(name), fields.number(next(i for i, known in KINDS.items() if known == kind)),
        *map(fields.number, (DTYPES[kind].itemsize, rows * cols, rows, cols)),
        fields.real(scale), fields.number(cols),
    )  # fmt: skip


def read_table(file: SbsFile) -> dict[str, SbsTensor]:
    """Every tensor that the blob `toc` describes. Raises CheckpointError."""
    words, at = file.words(TABLE), 0
    found: dict[str, SbsTensor] = {}
    while at < len(words):
        entry = Record(words, at, f"{file.path}: blob {TABLE!r}, entry {len(found)}")
        at = entry.end
        name = entry.text()
        kind, size, count, rows, cols = (entry.number() for _ in range(5))
        scale, stride = entry.real(1.0), entry.number(cols)
        where = f"{file.path}: tensor {name!r}"
        if not name or len(name) > KEY_BYTES or name in found:
            raise CheckpointError(f"{where} has no name, a long one, or is there twice")
        known = KINDS.get(kind, str(kind))
        if known not in DTYPES:
            raise CheckpointError(f"{where} is stored as {known}, expected F32, BF16 or SFP")
        dtype = DTYPES[known]
        if (size, count) != (dtype.itemsize, rows * cols) or (rows > 1 and stride != cols):
            raise CheckpointError(
                f"{where} claims {count} elements of {size} bytes in rows of {stride}, but is "
                f"{known} [{rows}, {cols}]"
            )
        blob = file.blob(name)
        if not count or blob.size != count * size:
            raise CheckpointError(
                f"{where} has {blob.size} bytes, but {known} [{rows}, {cols}] needs {count * size}"
            )
        if not 0 < scale <= _LARGEST_SCALE:
            raise CheckpointError(
                f"{where} has a scale of {scale}, expected one from above 0 to 2**100"
            )
        data = blob.view(np.ndarray).view(dtype).reshape(rows, cols)
        found[name] = SbsTensor(name, known, (rows, cols), scale, data)
    return found


def read_tensors(file: SbsFile, config: ModelConfig, format_name: str) -> Tensors:
    """Raises CheckpointError for a tensor that is missing, of another shape, or not Gemma's."""
    stored, used = read_table(file), set()
    found: dict[str, tuple[SbsTensor, Arrange]] = {}
    infos = {}
    for name, shape in config.tensor_shapes().items():
        options = locations(config, name)
        location = next((one for one in options if one.name in stored), None)
        if location is None:
            names = " or ".join(repr(one.name) for one in options)
            raise CheckpointError(f"{file.path}: tensor {names} is missing")
        tensor = stored[location.name]
        if tensor.shape != location.shape:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but the "
                f"config implies {list(location.shape)}"
            )
        if len(shape) == 1 and (tensor.kind == "SFP" or tensor.scale != 1):
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} is a norm in {tensor.kind} with a scale of "
                f"{tensor.scale}, expected BF16 or F32 and 1"
            )
        used.add(location.name)
        found[name], infos[name] = (tensor, location.take), _info(tensor, shape)
    for name in stored:
        if name not in used:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} does not belong to a Gemma 3 text model, or is "
                "there in two layouts"
            )

    def read(name: str) -> Tensor:
        tensor, take = found[name]
        return _read(file, tensor, take, infos[name].shape)

    return Tensors(infos, read, Origin(format_name, file_stamp(file.path)))


def locations(config: ModelConfig, name: str) -> list[Location]:
    """Where a tensor of the model may be; the first is where it is written."""
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if name == EMBEDDING:
        return [Location("c_embedding", (config.vocab_size, h), _whole)]
    if name == "model.norm.weight":
        return [Location("c_final_norm", (1, h), _whole)]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)

    def at(base: str, rows: int, cols: int, take: Arrange = _whole) -> Location:
        return Location(f"{base}_{layer}", (rows, cols), take)

    if module in _NORMS:
        return [at(_NORMS[module], 1, d if module.startswith("self_attn") else h)]
    q, kv = heads * d, 2 * kv_heads * d

    def of_heads(which: int) -> Arrange:  # keys, 0, or values, 1
        return lambda w: w.reshape(kv_heads, 2, d, h)[:, which].reshape(-1, h)

    def in_turns(which: int) -> list[Location]:
        take = of_heads(which)
        return [at("qkv2_w", kv, h, take), at("qkv_ein", q + kv, h, lambda w: take(w[q:]))]

    def by_heads(w: np.ndarray) -> np.ndarray:
        return w.reshape(heads, h, d).transpose(1, 0, 2).reshape(h, q)

    return {
        "self_attn.q_proj": [at("qkv1_w", q, h), at("qkv_ein", q + kv, h, lambda w: w[:q])],
        "self_attn.k_proj": in_turns(0),
        "self_attn.v_proj": in_turns(1),
        "self_attn.o_proj": [at("att_w", h, q), at("att_ein", heads * h, d, by_heads)],
        "mlp.gate_proj": [at("gating1_w", f, h), at("gating_ein", 2 * f, h, lambda w: w[:f])],
        "mlp.up_proj": [at("gating2_w", f, h), at("gating_ein", 2 * f, h, lambda w: w[f:])],
        "mlp.down_proj": [at("linear_w", h, f)],
    }[module]


def join_heads(keys: np.ndarray, values: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Keys and values as they lie together, head by head in turns: `[2 * KV * D, H]`."""
    shape = config.num_key_value_heads, 1, config.head_dim, config.hidden_size
    both = np.concatenate([keys.reshape(shape), values.reshape(shape)], axis=1)
    return both.reshape(-1, config.hidden_size)


def _whole(stored: np.ndarray) -> np.ndarray:
    return stored


def _info(tensor: SbsTensor, shape: tuple[int, ...]) -> TensorInfo:
    size = math.prod(shape)
    if tensor.kind == "SFP":
        return TensorInfo(shape, SFP8, size + 4)  # a byte each, and the scale
    dtype = DTYPES["F32"] if tensor.scale != 1 else DTYPES[tensor.kind]
    return TensorInfo(shape, dtype.name, size * dtype.itemsize)


def _read(file: SbsFile, tensor: SbsTensor, take: Arrange, shape: tuple[int, ...]) -> Tensor:
    part = take(tensor.data).reshape(shape)
    if tensor.kind != "SFP":
        if tensor.scale != 1:
            with np.errstate(over="ignore", invalid="ignore"):
                part = part.astype(np.float32) * np.float32(tensor.scale)
        check_finite(file.path, tensor.name, part)
        return part
    flat = part.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        if (flat[start : start + _CHUNK] == RESERVED).any():
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name!r} holds the code {RESERVED:#x}, which is "
                "reserved; the file is damaged"
            )
    return Sfp8Tensor(part, tensor.scale)
