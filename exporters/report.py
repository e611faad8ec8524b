"""What every exporter returns, and what it asks of its target."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.quantization import TensorError


@dataclass(frozen=True)
class ExportReport:
    """A file that was written."""

    path: Path
    nbytes: int
    format: str  # "tflite", "litertlm"
    precision: str
    context_length: int
    refitted: tuple[TensorError, ...] = ()  # tensors whose scales the format could not hold


def check_target(path: Path) -> None:
    """Refuses, before any work, a target that is in use or cannot be written."""
    try:
        if path.exists():
            raise OptionError(f"{path}: exists already; choose another name or remove it first")
        parent = path.parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:  # a name too long, a directory that may not be entered
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{path}: cannot be written: no permission in {parent}")
