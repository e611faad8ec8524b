"""Formats: how models lie on disk. A format is a pair of modules with one name.

`gemma_multi/formats/X` says what the format looks like (detect it by content, read it, its
constants) and has a record `FORMAT`; `exporters/X` writes it and has a record `EXPORTER`. A new
format is those two files: what is here finds them, and `open_checkpoint`, `export`, `info` and the
command line ask it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError
from gemma_multi.formats.base import Format
from gemma_multi.registry import find_records

__all__ = ["Format", "formats", "read"]


@cache
def formats() -> dict[str, Format]:
    """Every format by its name."""
    return {record.name: record for record in find_records(__name__, "FORMAT", Format)}


def read(path: str | Path) -> Checkpoint:
    """Opens a model on disk, whatever its format.

    Raises CheckpointError, ConfigError or TokenizerError naming the file and the tensor.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory or file")
    return _format_of(path).read(path)


def _format_of(path: Path) -> Format:
    known = formats().values()
    for one in known:
        if one.looks_like(path):
            return one
    # what is damaged, or lacks a part, is read as what it claims to be, which names the fault
    if path.is_dir():
        return formats()["huggingface"]
    for one in known:
        if one.suffix and path.suffix == one.suffix:
            return one
    kinds = ", ".join(one.what for one in known if one.is_model)
    raise CheckpointError(f"{path}: is none of what can be opened: {kinds}")
