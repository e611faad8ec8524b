"""A Hugging Face directory: dense weights, in float32, bfloat16 or float16, as transformers reads
them and as mlx-lm and most fine-tuning programs write them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_multi.checkpoint import Checkpoint, Tensor
from gemma_multi.errors import CheckpointError
from gemma_multi.formats.base import Format
from gemma_multi.formats.directory import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Flat,
    config_entry,
    read_directory,
)


def _looks_like(path: Path) -> bool:
    weights = (path / WEIGHTS_FILE, path / INDEX_FILE)
    if not (path / CONFIG_FILE).is_file() or not any(file.exists() for file in weights):
        return False
    return config_entry(path, "quantization") is None


def _read(path: Path) -> Checkpoint:
    return read_directory(path, FORMAT.name, _refuse_packed)


def _refuse_packed(
    file: Path, stem: str, packed: np.ndarray, shape: tuple[int, ...], flat: Flat
) -> Tensor:
    raise CheckpointError(
        f"{file}: tensor '{stem}.weight' is packed, but {CONFIG_FILE} has no quantization entry"
    )


FORMAT = Format(
    name="huggingface", what="a Hugging Face directory", suffix="",
    looks_like=_looks_like, read=_read,
)  # fmt: skip
