"""`.litertlm`: the bundle that LiteRT-LM loads, a row of sections behind a header.

The model's section is a `.tflite` with its trailer, and is read in place; the tokenizer is a
section of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import BackendError, CheckpointError
from gemma_multi.files import begins_with
from gemma_multi.formats.base import Format
from gemma_multi.formats.tflite.file import TfliteFile

# A bundle begins with this mark; where its header begins, and where the header's end is written
MARK, HEADER, HEADER_END = b"LITERTLM", 32, 24
_MODEL, _TOKENIZER = "model", "tokenizer"


def _read(path: Path) -> Checkpoint:
    path = path.absolute()
    try:
        sections = _sections(path, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error

    def tokenizer() -> bytes:
        begin, end = sections[_TOKENIZER]
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    return TfliteFile(path, sections[_MODEL], tokenizer).checkpoint(FORMAT.name)


def _sections(path: Path, size: int) -> dict[str, tuple[int, int]]:
    """Where a bundle's model and tokenizer begin and end."""
    header = _header_schema()
    kind = header.AnySectionDataType
    names = {kind.TFLiteModel: _MODEL, kind.SP_Tokenizer: _TOKENIZER}
    found: dict[str, tuple[int, int]] = {}
    try:
        with path.open("rb") as file:
            start = file.read(HEADER)
            if not start.startswith(MARK):
                raise CheckpointError(f"{path}: is not a .litertlm file: it does not begin as one")
            end = int.from_bytes(start[HEADER_END:], "little")
            if not len(start) < end <= min(size, 1 << 24):
                raise CheckpointError(f"{path}: its header ends at {end}, outside the file")
            metadata = header.LiteRTLMMetaData.GetRootAs(file.read(end - len(start)), 0)
        sections = metadata.SectionMetadata()
        for i in range(min(sections.ObjectsLength(), 1000)):
            entry = sections.Objects(i)
            if entry.DataType() in names:
                found[names[entry.DataType()]] = (entry.BeginOffset(), entry.EndOffset())
    except CheckpointError:
        raise
    except Exception as error:  # flatbuffers raise whatever their bytes lead to
        raise CheckpointError(f"{path}: its header is damaged: {error}") from error
    for name in names.values():
        if name not in found:
            raise CheckpointError(f"{path}: has no {name} section; export it again")
        first, last = found[name]
        if not 0 <= first < last <= size:
            raise CheckpointError(
                f"{path}: its {name} section runs from {first} to {last}, outside the {size} bytes "
                "of the file"
            )
    return found


def _header_schema() -> Any:
    """The schema of a bundle's header, without the rest of its package, which takes 50 ms."""
    package = importlib.util.find_spec("litert_lm_builder")
    if package is None or not package.submodule_search_locations:
        raise BackendError(
            "reading a .litertlm needs litert-lm-builder: pip install 'gemma-multi[litert]'"
        )
    name = "litertlm_header_schema_py_generated"
    file = Path(package.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORMAT = Format(
    name="litertlm", what="a .litertlm bundle", suffix=".litertlm",
    looks_like=lambda path: path.is_file() and begins_with(path, MARK), read=_read,
)  # fmt: skip
