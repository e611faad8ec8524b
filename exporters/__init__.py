"""Exporters: a Checkpoint to what phones and peers load. One module per format, one signature."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi.errors import OptionError

if TYPE_CHECKING:
    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.exporters.report import ExportReport
    from gemma_multi.model import Model

FORMATS = {".tflite": "tflite", ".litertlm": "litertlm"}


def export(
    model: str | Path | Checkpoint | Model, path: str | Path, **options: Any
) -> ExportReport:
    """Writes a model as a file of the format that the suffix of `path` names.

    `model` is whatever `load` takes, or a loaded Model. For the options see the format's module:
    `.tflite` and `.litertlm` take `context_length`, `prefill`, `precision` and `cache`.
    Raises OptionError or CheckpointError; then nothing is left behind.
    """
    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.checkpoint.resolve import resolve

    suffix = check_format(path)
    writer = importlib.import_module(f"gemma_multi.exporters.{FORMATS[suffix]}").export
    from gemma_multi.model import Model

    if isinstance(model, Model):
        model = model.checkpoint
    checkpoint = model if isinstance(model, Checkpoint) else resolve(model)
    try:
        return writer(checkpoint, path, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        unknown = str(error).split("'")[-2]
        raise OptionError(f"{suffix} takes no option {unknown!r}") from None


def check_format(path: str | Path) -> str:
    """The suffix of `path`, if it names a format."""
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise OptionError(f"{path}: the name must end in {' or '.join(FORMATS)}, to say what it is")
    return suffix
