"""What every exporter is and gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.progress import Report
from gemma_multi.transforms import TensorError


@dataclass(frozen=True)
class ExportReport:
    """A file or directory that was written."""

    path: Path
    nbytes: int
    format: str  # a name in `gemma_multi.formats`
    precision: str
    context_length: int
    refitted: tuple[TensorError, ...] = ()  # tensors whose scales the format could not hold
    target: str = ""  # what it is laid out for, where a format asks: "cpu" or "gpu" (CPUs, too)


@dataclass(frozen=True)
class Exporter:
    """How a checkpoint is written in the format of the same name.

    `options` is a dataclass, whose fields are the keyword arguments of `export` and the options
    of the command line. `write` finds its output free and must leave nothing when it fails.
    """

    format: str
    options: type
    write: Callable[[Checkpoint, Path, Any, Report], ExportReport]
