"""A safetensors file: read as memory-mapped NumPy arrays, written by the library.

The safetensors library copies each tensor it reads and does not say which one is at fault. The
format is small: 8 bytes of header length, a JSON header of `{name: {dtype, shape,
data_offsets}}`, then the data. Here every length is checked before it is believed, arrays are
views of the mapped file, and an error names the file and the tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma_multi.errors import CheckpointError
from gemma_multi.files import unique_keys

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
}
_LARGEST_HEADER = 100_000_000  # the library's own limit
_CHUNK = 1 << 20


def read_safetensors(
    path: Path, dtypes: Mapping[str, np.dtype] = DTYPES
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a file; the tensors, of `dtypes`, are read-only views of its mapped
    bytes."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a file")
        if size < 8:
            raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file")
        mapped = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    length = int(mapped[:8].view("<u8")[0])
    if length > min(size - 8, _LARGEST_HEADER):
        raise CheckpointError(
            f"{path}: its header claims {length} bytes, but the file has {size}; "
            "it is truncated or no safetensors file"
        )
    try:
        header = json.loads(
            mapped[8 : 8 + length].tobytes().decode("utf-8"), object_pairs_hook=unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is not a JSON object")

    data = mapped[8 + length :]
    spans = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _read_entry(path, name, entry, len(data), dtypes)
        spans.append((begin, end, name))
        tensors[name] = data[begin:end].view(np.ndarray).view(dtype).reshape(shape)
    position, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps" if begin < position else "leaves a gap after"
            raise CheckpointError(f"{path}: tensor {name!r} {what} {before!r}")
        position, before = end, name
    if position != len(data):
        raise CheckpointError(f"{path}: {len(data) - position} bytes follow the last tensor")
    return tensors, metadata


def write_safetensors(
    tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Raises OSError, which the library wraps in a type of its own. Who calls forces it to the
    disk."""
    try:
        save_file(tensors, path, metadata=metadata)
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, str(error)) from error


def check_finite(path: Path, name: str, tensor: np.ndarray) -> None:
    """Raises CheckpointError where a floating-point tensor holds NaN or an infinity."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if part.dtype.itemsize == 2:  # the exponent's bits all set: NaN or infinity
            exponent = 0x7F80 if part.dtype == DTYPES["BF16"] else 0x7C00
            bad = (part.view(np.uint16) & 0x7FFF).max() >= exponent
        else:
            bad = not np.isfinite(part).all()
        if bad:
            raise CheckpointError(f"{path}: tensor {name!r} holds NaN or infinity")


def _read_entry(
    path: Path, name: str, entry: Any, available: int, dtypes: Mapping[str, np.dtype]
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets")
    dtype = dtypes.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where} has dtype {entry['dtype']!r}, expected one of {', '.join(dtypes)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or len(shape) > 8 or 0 in shape:
        raise CheckpointError(f"{where} has shape {shape!r}, expected a list of sizes above 0")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
        raise CheckpointError(
            f"{where} has data_offsets {offsets!r}, outside the {available} bytes of data"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"{where} has {end - begin} bytes, but {entry['dtype']} {shape} needs "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    return dtype, tuple(shape), begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48 for n in value
    )
