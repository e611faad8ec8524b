"""Exporters: a Checkpoint to what phones and peers load.

One module a format, with the name it has in `gemma_multi.formats`, and in it a record `EXPORTER`;
they are found by that name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.files import check_output
from gemma_multi.formats import Format, formats
from gemma_multi.options import checked
from gemma_multi.progress import Report, silent
from gemma_multi.registry import find_records

__all__ = ["ExportReport", "Exporter", "choose_format", "export_checkpoint", "exporters", "save"]


@cache
def exporters() -> dict[str, Exporter]:
    """Every exporter by its format's name."""
    return {record.format: record for record in find_records(__name__, "EXPORTER", Exporter)}


def choose_format(output: str | Path, name: str | None = None) -> Format:
    """The format to write: the one named, or the one whose suffix `output` has. Raises
    OptionError."""
    known = formats()
    writable = [known[one] for one in exporters() if one in known]
    if name is not None:
        for one in writable:
            if one.name == name:
                return one
        names = ", ".join(one.name for one in writable)
        raise OptionError(f"format is {name!r}, expected one of {names}")
    suffix = Path(output).suffix
    for one in writable:
        if one.suffix and one.suffix == suffix:
            return one
    *others, last = (one.suffix for one in writable if one.suffix)
    files = f"{', '.join(others)} or {last}"
    directories = " or ".join(repr(one.name) for one in writable if one.is_directory)
    raise OptionError(
        f"{output}: the name must end in {files}, to say what it is; for a directory give "
        f"format={directories}"
    )


def export_checkpoint(
    checkpoint: Checkpoint, output: str | Path, *, format: str | None = None,
    progress: Report = silent, **options: Any,
) -> ExportReport:  # fmt: skip
    """Writes `checkpoint`; see `gemma_multi.export`, which this is behind."""
    output, chosen = Path(output), choose_format(output, format)
    check_output(output, directory=chosen.is_directory)
    exporter = exporters()[chosen.name]
    settings: Any = checked(exporter.options, options, f"format {chosen.name!r}")
    try:
        return exporter.write(checkpoint, output, settings, progress)
    except OSError as error:
        raise CheckpointError(
            f"{output}: cannot be written: {error.strerror or error}; nothing was written"
        ) from error


def save(checkpoint: Checkpoint, output: str | Path) -> Path:
    """Writes a directory in the stored precision: mlx-lm's where a tensor is quantised, else
    Hugging Face's. Raises OptionError where `output` is in use, CheckpointError."""
    kind = "mlx" if checkpoint.is_quantized else "huggingface"
    return export_checkpoint(checkpoint, output, format=kind).path
