"""`convert`: a model in another format, read back, and what that cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi import formats
from gemma_multi.checkpoint import Checkpoint, Tensor, dense, rows_of
from gemma_multi.exporters import ExportReport
from gemma_multi.exporting import export
from gemma_multi.progress import Progress
from gemma_multi.quantization.tensor import SFP8, PackedTensor
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.transforms import GRIDS, TensorError

_ROWS = 1 << 13  # compared at a time
_BITS = GRIDS | {SFP8: 8}


@dataclass(frozen=True)
class Conversion:
    """What was written, and how its numbers differ from those it was made of."""

    export: ExportReport
    before: str  # precision
    compared: int  # tensors; 0 where the format is written and not read back
    changed: tuple[TensorError, ...]  # of those, by the root mean square of what was there

    def __str__(self) -> str:
        written = f"{self.before} to {self.export.precision}: "
        if not self.compared:
            return written + f"{self.export.format} is not read back, so nothing was compared"
        if not self.changed:
            return written + f"all {self.compared} tensors hold the same numbers"
        worst = max(self.changed, key=lambda tensor: tensor.error)
        return written + (
            f"{self.compared - len(self.changed)} of {self.compared} tensors hold the same "
            f"numbers; of the others {worst.name} differs most, by {worst.error:.2%}"
        )


def convert(
    model: Source, output: str | Path, *, format: str | None = None, progress: Progress = True,
    **options: Any,
) -> Conversion:  # fmt: skip
    """Writes a model in another format, and compares what is read back with what was there. Takes
    what `export` takes, and raises what it raises."""
    named = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    report = export(model, output, format=format, progress=progress, **options)
    before = open_checkpoint(model, **named)
    if not formats.formats()[report.format].is_model:
        return Conversion(report, before.precision, 0, ())
    after = formats.read(report.path)
    changed = tuple(_changes(before, after))
    return Conversion(report, before.precision, len(before.tensors), changed)


def _changes(before: Checkpoint, after: Checkpoint) -> Iterator[TensorError]:
    for name, shape in before.config.tensor_shapes().items():
        one, other = before.tensors[name], after.tensors[name]
        error = 0.0 if _stored_alike(one, other) else _difference(one, other)
        if error:
            bits = _BITS[other.kind] if isinstance(other, PackedTensor) else 8 * other.itemsize
            yield TensorError(name, shape, bits, error)


def _stored_alike(one: Tensor, other: Tensor) -> bool:
    """Which spares comparing their values."""
    if isinstance(one, PackedTensor) or isinstance(other, PackedTensor):
        return bool(one == other) if isinstance(one, type(other)) else False
    return one.dtype == other.dtype and np.array_equal(one, other)


def _difference(one: Tensor, other: Tensor) -> float:
    wrong = whole = 0.0
    for start in range(0, one.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        a, b = (dense(rows_of(tensor, rows)).astype(np.float32) for tensor in (one, other))
        wrong += float(np.square(a - b, dtype=np.float64).sum())
        whole += float(np.square(a, dtype=np.float64).sum())
    return float(np.sqrt(wrong / max(whole, 1e-30)))
