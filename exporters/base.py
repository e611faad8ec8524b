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
class Verification:
    """What a program that reads the format made of a file: see `gemma_multi.verifying`."""

    consumer: str = ""  # "onnxruntime"; "" where nobody was asked
    tokens: int = 0  # of the text
    difference: float = 0.0  # of logits, the largest
    divergence: float = 0.0  # nats a token, from the weights that were written
    why_not: str = ""

    def __str__(self) -> str:
        if not self.consumer:
            return f"not verified: {self.why_not}"
        return (
            f"verified with {self.consumer}: over {self.tokens} tokens logits differ by at most "
            f"{self.difference:.1g} ({self.divergence:.1g} nats a token)"
        )


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
    verification: Verification | None = None  # None: not wanted


@dataclass(frozen=True)
class Exporter:
    """How a checkpoint is written in the format of the same name.

    `options` is a dataclass, whose fields are the keyword arguments of `export` and the options
    of the command line. `write` finds its output free and must leave nothing when it fails.
    """

    format: str
    options: type
    write: Callable[[Checkpoint, Path, Any, Report], ExportReport]
