"""`.tflite`: Gemma 3 as one TensorFlow Lite file, as our exporter writes it.

`layout` has the names and constants that reader, exporter and engine share, `file` reads.
"""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.files import begins_with
from gemma_multi.formats.base import Format
from gemma_multi.formats.tflite.file import TfliteFile

_IDENTIFIER, _AT = b"TFL3", 4  # a flatbuffer's file identifier and its place


def _read(path: Path) -> Checkpoint:
    return TfliteFile(path).checkpoint(FORMAT.name)


FORMAT = Format(
    name="tflite", what="a .tflite file", suffix=".tflite",
    looks_like=lambda path: path.is_file() and begins_with(path, _IDENTIFIER, _AT), read=_read,
)  # fmt: skip
