"""A GGUF file's tensors in the forms this package holds, each made when it is asked for.

| stored | becomes | |
| --- | --- | --- |
| F32, F16, BF16 | the same, a view of the mapped file | |
| Q4_0 | int4 in groups of 32 | the same codes and scales, packed in another order |
| Q8_0 | int8 in groups of 32 | the same |
| any other | float32 | by the gguf package's dequantiser, a few thousand rows at a time |

Scales are float16 in the file. A tensor whose scales bfloat16 holds as well has them in that type,
as our own grid does. A norm whose `1 + w` comes from a bfloat16 `w`, as in every Gemma, is that `w`
again; where that loses anything, a file of ours has the norms once more.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gemma_multi.checkpoint import Origin, Tensor, TensorInfo, Tensors
from gemma_multi.config import EMBEDDING, ModelConfig
from gemma_multi.errors import CheckpointError
from gemma_multi.files import file_stamp
from gemma_multi.formats.gguf.file import GgufFile, StoredTensor
from gemma_multi.formats.gguf.layout import HEAD, NORM_TYPES, NORMS, stored_name
from gemma_multi.quantization.int4 import CODE_MIN, GROUP_SIZE, SMALLEST_SCALE
from gemma_multi.quantization.tensor import BFLOAT16, QuantizedTensor, pack
from gemma_multi.safetensors_file import check_finite

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BFLOAT16}
BITS = {"Q4_0": 4, "Q8_0": 8}  # a block is a float16 scale and 32 codes
_TYPES = {dtype.name: dtype for dtype in DTYPES.values()}
_CHUNK_ROWS = 1 << 13


def read_tensors(file: GgufFile, config: ModelConfig, format_name: str) -> Tensors:
    """Raises CheckpointError for a tensor that is missing, of another shape, or not Gemma's."""
    shapes = config.tensor_shapes()
    known = {stored_name(name) for name in shapes}
    stored: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        found = file.tensors.get(stored_name(name))
        if found is None:
            raise CheckpointError(f"{file.path}: tensor {stored_name(name)!r} is missing")
        if found.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {stored_name(name)!r} has shape {list(found.shape)}, but "
                f"the metadata imply {list(shape)}"
            )
        stored[name] = found
    _check_head(file)
    for name in file.tensors:
        if name not in known and name != HEAD and not name.startswith("rope_freqs"):
            raise CheckpointError(
                f"{file.path}: tensor {name!r} does not belong to a Gemma 3 text model"
            )

    gains = {
        name: _dense(file.path, stored_name(name), tensor).astype(np.float32)
        for name, tensor in stored.items() if len(tensor.shape) == 1
    }  # fmt: skip
    norms = {name: norm_of(gain) for name, gain in gains.items()} | _kept_norms(file, gains)

    def read(name: str) -> Tensor:
        if name in norms:
            return norms[name]
        return _read_matrix(file.path, stored_name(name), stored[name])

    infos = {
        name: TensorInfo.of(norms[name]) if name in norms else _info(tensor)
        for name, tensor in stored.items()
    }  # fmt: skip
    return Tensors(infos, read, Origin(format_name, file_stamp(file.path)))


def _info(tensor: StoredTensor) -> TensorInfo:
    """Of a matrix, without reading it."""
    size = math.prod(tensor.shape)
    if tensor.kind in BITS:  # a scale and a bias a group
        bits = BITS[tensor.kind]
        return TensorInfo(tensor.shape, f"int{bits}", size * bits // 8 + size // GROUP_SIZE * 4)
    dtype = DTYPES.get(tensor.kind, DTYPES["F32"])
    return TensorInfo(tensor.shape, dtype.name, size * dtype.itemsize)


def _check_head(file: GgufFile) -> None:
    head, embedding = file.tensors.get(HEAD), file.tensors[stored_name(EMBEDDING)]
    if head is not None and (
        (head.kind, head.shape) != (embedding.kind, embedding.shape)
        or not np.array_equal(head.data, embedding.data)
    ):
        raise CheckpointError(
            f"{file.path}: tensor {HEAD!r} differs from the embedding, but Gemma 3 ties the two"
        )


def gain_of(norm: np.ndarray) -> np.ndarray:
    """What a file has for a norm: `1 + w` in float32."""
    return 1 + norm.astype(np.float32)


def norm_of(gain: np.ndarray) -> np.ndarray:
    """A norm from what a file has for it: in bfloat16 if that gives the same, else in float32."""
    weight = gain - np.float32(1)
    short = weight.astype(BFLOAT16)
    return short if np.array_equal(gain_of(short), gain) else weight


def _kept_norms(file: GgufFile, gains: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The norms of a file that has them as they were; none that its tensors do not agree with."""
    data, types = (file.metadata.get(key, ()) for key in (NORMS, NORM_TYPES))
    if not isinstance(data, np.ndarray) or not isinstance(types, list) or len(types) != len(gains):
        return {}
    kept, begin = {}, 0
    for (name, gain), kind in zip(gains.items(), types, strict=True):
        dtype = _TYPES.get(kind.decode("utf-8", "replace"))
        if dtype is None:
            return {}
        part = data.view(np.uint8)[begin : (begin := begin + gain.size * dtype.itemsize)]
        if part.size == gain.size * dtype.itemsize:
            norm = np.frombuffer(part.tobytes(), dtype)
            if np.array_equal(gain_of(norm), gain):
                kept[name] = norm
    return kept


def _read_matrix(path: Path, name: str, tensor: StoredTensor) -> Tensor:
    if tensor.kind in BITS:
        return _read_grid(path, name, tensor, BITS[tensor.kind])
    return _dense(path, name, tensor)


def _dense(path: Path, name: str, tensor: StoredTensor) -> np.ndarray:
    if tensor.kind in DTYPES:
        array = tensor.data.view(np.ndarray).view(DTYPES[tensor.kind]).reshape(tensor.shape)
    else:
        array = _dequantize(path, name, tensor)
    check_finite(path, name, array)
    return array


def _dequantize(path: Path, name: str, tensor: StoredTensor) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    array = np.empty(tensor.shape, np.float32)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused afterwards
            for start in range(0, len(rows), _CHUNK_ROWS):
                part = slice(start, start + _CHUNK_ROWS)
                array[part] = dequantize(rows[part], GGMLQuantizationType[tensor.kind])
    except NotImplementedError as error:
        raise CheckpointError(
            f"{path}: tensor {name!r} is stored as {tensor.kind}, which the gguf package cannot "
            "dequantise"
        ) from error
    return array


def _read_grid(path: Path, name: str, tensor: StoredTensor, bits: int) -> Tensor:
    rows, width = tensor.shape
    blocks = tensor.data.view(np.ndarray).reshape(rows, width // GROUP_SIZE, -1)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    check_finite(path, name, scales)
    if bits == 8:  # two's complement -> offset by 128
        packed = (np.ascontiguousarray(blocks[..., 2:]) ^ np.uint8(0x80)).reshape(rows, width)
        words = packed.view("<u4")
    else:  # 16 bytes: codes 0 to 15 in the low halves, 16 to 31 in the high ones
        codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
        if np.any(empty := scales == 0):  # the grid has no zero scale; the codes say it as well
            codes[empty] = -CODE_MIN
            scales = np.where(empty, np.float16(SMALLEST_SCALE), scales)
        words = pack(codes.reshape(rows, width), 4)
    if np.array_equal(scales.astype(BFLOAT16), scales):
        return QuantizedTensor.centred(words, scales, bits)
    with np.errstate(over="ignore"):
        biases = scales * np.float16(-(1 << (bits - 1)))
    if not np.isfinite(biases).all():  # no weights of a model: 128 times it passes 65,504
        return _dequantize(path, name, tensor)
    return QuantizedTensor(words, scales, biases, bits)
