"""ONNX: the directory that Transformers.js and onnxruntime load. It is written, and not read back:
a graph is operators, and what they were made from says more."""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError
from gemma_multi.formats.base import Format
from gemma_multi.formats.directory import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE

FOLDER = "onnx"  # where in the directory the graphs are


def _looks_like(path: Path) -> bool:
    if any((path / weights).exists() for weights in (WEIGHTS_FILE, INDEX_FILE)):
        return False  # a directory may hold both
    return (path / CONFIG_FILE).is_file() and any((path / FOLDER).glob("*.onnx"))


def _read(path: Path) -> Checkpoint:
    raise CheckpointError(
        f"{path}: is an ONNX export, for onnxruntime and Transformers.js, and holds no tensors to "
        "open; open the checkpoint that it was made from"
    )


FORMAT = Format(
    name="onnx", what="an ONNX export's directory", suffix="", looks_like=_looks_like, read=_read,
    is_model=False,
)  # fmt: skip
