"""`.tflite`: Gemma 3 as one TensorFlow Lite file, as our exporter writes it.

`layout` has the names and constants that reader, exporter and engine share, `file` reads.
"""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.formats.base import Format
from gemma_multi.formats.tflite.file import TfliteFile

_IDENTIFIER, _AT = b"TFL3", 4  # a flatbuffer's file identifier and its place


def begins_with(path: Path, mark: bytes, at: int = 0) -> bool:
    """Whether a file has these bytes at this place."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(len(mark)) == mark
    except OSError:
        return False


def _read(path: Path) -> Checkpoint:
    return TfliteFile(path).checkpoint(FORMAT.name)


FORMAT = Format(
    name="tflite", what="a .tflite file", suffix=".tflite",
    looks_like=lambda path: path.is_file() and begins_with(path, _IDENTIFIER, _AT), read=_read,
)  # fmt: skip
