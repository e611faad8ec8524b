"""mlx-lm's quantised directory, which is our int4 directory as well.

A Hugging Face directory whose `config.json` has an entry `quantization` (`group_size`, `bits`,
`mode`), and in which a quantised weight comes as three tensors: `X.weight` (32-bit words of
codes, lowest bits first), `X.scales` and `X.biases`. A module that differs from the rest has an
entry of its own by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.errors import CheckpointError
from gemma_multi.formats.base import Format
from gemma_multi.formats.directory import CONFIG_FILE, Flat, config_entry, read_directory
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.safetensors_file import check_finite

QUANTIZATION = "quantization"  # in config.json


def quantization_entry(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Any]:
    """config.json's `quantization` for quantised tensors by name, without ".weight": the linear
    layers' settings, and those of the modules that differ."""
    linear = list(quantized.values())[-1]  # the embedding comes first, where it is quantised
    entry: dict[str, Any] = {"group_size": linear.group_size, "bits": linear.bits, "mode": "affine"}
    for name, tensor in quantized.items():
        if (tensor.bits, tensor.group_size) != (linear.bits, linear.group_size):
            entry[name] = {"group_size": tensor.group_size, "bits": tensor.bits}
    return entry


def _looks_like(path: Path) -> bool:
    return config_entry(path, QUANTIZATION) is not None


def _read(path: Path) -> Checkpoint:
    return read_directory(
        path, FORMAT.name, partial(_read_packed, config_entry(path, QUANTIZATION))
    )


def _read_packed(
    quantization: Any, file: Path, stem: str, packed: np.ndarray, shape: tuple[int, ...],
    flat: Flat,
) -> Tensor:  # fmt: skip
    where = f"{file}: tensor '{stem}.weight'"
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{where} is packed, but {CONFIG_FILE} has {quantization!r} as quantization"
        )
    own = quantization.get(stem, quantization.get(f"language_model.{stem}"))
    settings = {**quantization, **own} if isinstance(own, dict) else quantization
    bits, group = settings.get("bits"), settings.get("group_size")
    if settings.get("mode", "affine") != "affine" or type(bits) is not int or bits not in (4, 8):
        raise CheckpointError(
            f"{where} is quantised as {settings.get('mode', 'affine')} with {bits} bits, "
            "expected affine with 4 or 8"
        )
    rows, width = shape
    if type(group) is not int or group < 1 or width % group or (width * bits) % 32:
        raise CheckpointError(f"{where} has group_size {group!r}, which does not divide {width}")
    parts = []
    for part in ("scales", "biases"):
        owner, array = flat.pop(f"{stem}.{part}", (file, None))
        if array is None:
            raise CheckpointError(f"{owner.parent}: tensor '{stem}.{part}' is missing")
        if array.shape != (rows, width // group) or array.dtype == np.uint32:
            raise CheckpointError(
                f"{owner}: tensor '{stem}.{part}' has shape {list(array.shape)} and type "
                f"{array.dtype}, expected floats of {[rows, width // group]}"
            )
        check_finite(owner, f"{stem}.{part}", array)
        parts.append(array)
    if packed.shape != (rows, width * bits // 32):
        raise CheckpointError(
            f"{where} has shape {list(packed.shape)}, expected {[rows, width * bits // 32]} "
            f"words of {bits}-bit codes"
        )
    scales, biases = parts
    return QuantizedTensor(packed, scales, biases, bits, group)


FORMAT = Format(
    name="mlx", what="an mlx-lm directory", suffix="", looks_like=_looks_like, read=_read
)
