"""`.sbs`: the file of gemma.cpp, its config, tokenizer and tensors in one.

`file` reads the container, `fields` its structures, `layout` has gemma.cpp's config, `tensors` its
names and where each tensor lies.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

from gemma_multi.checkpoint import Checkpoint, Provenance
from gemma_multi.errors import TokenizerError
from gemma_multi.files import begins_with
from gemma_multi.formats.base import Format, checked_generation
from gemma_multi.formats.sbs.file import MAGIC, SbsFile
from gemma_multi.formats.sbs.layout import (
    GENERATION,
    PROVENANCE,
    TOKENIZER,
    read_config,
    read_own,
)
from gemma_multi.formats.sbs.tensors import read_tensors
from gemma_multi.tokenizer import Tokenizer


def _read(path: Path) -> Checkpoint:
    file = SbsFile(path)
    config = read_config(file)
    tensors = read_tensors(file, config, FORMAT.name)
    kinds = ", ".join(
        sorted({info.dtype for info in tensors.infos.values() if len(info.shape) > 1})
    )
    ours = Provenance.from_json(json.dumps(read_own(file, PROVENANCE)))
    return Checkpoint(
        config=config,
        tensors=tensors,
        provenance=ours or Provenance(
            source=path.stem, modifications=(f"stored for gemma.cpp in {kinds}",)
        ),
        generation=checked_generation(read_own(file, GENERATION), f"{path}: {GENERATION}"),
        path=path,
        make_tokenizer=cache(partial(_read_tokenizer, file)),
    )  # fmt: skip


def _read_tokenizer(file: SbsFile) -> Tokenizer:
    if TOKENIZER not in file.blobs:
        raise TokenizerError(f"{file.path}: blob {TOKENIZER!r} is missing")
    try:
        return Tokenizer(file.blob(TOKENIZER).tobytes())
    except TokenizerError as error:
        raise TokenizerError(f"{file.path}: its tokenizer: {error}") from error


FORMAT = Format(
    name="sbs", what="an .sbs file", suffix=".sbs",
    looks_like=lambda path: path.is_file() and begins_with(path, MAGIC), read=_read,
)  # fmt: skip
