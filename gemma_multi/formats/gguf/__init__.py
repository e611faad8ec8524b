"""`.gguf`: the file of llama.cpp, its config, tokenizer and tensors in one.

`file` reads the container, `layout` has llama.cpp's names, `tensors` makes weights of blocks.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from gemma_multi.checkpoint import Checkpoint, Provenance
from gemma_multi.errors import TokenizerError
from gemma_multi.files import begins_with
from gemma_multi.formats.base import Format, checked_generation
from gemma_multi.formats.gguf.file import MAGIC, GgufFile
from gemma_multi.formats.gguf.layout import (
    GENERATION,
    KINDS,
    PAD_PIECE,
    PROVENANCE,
    REPOSITORY,
    RESERVED,
    SCORES,
    TOKENIZER_MODEL,
    TOKENS,
    read_config,
    read_own,
)
from gemma_multi.formats.gguf.tensors import read_tensors
from gemma_multi.sentencepiece_model import SPACE, PieceKind, sentencepiece_from_pieces
from gemma_multi.tokenizer import Tokenizer


def _read(path: Path) -> Checkpoint:
    file = GgufFile(path)
    config = read_config(file)
    return Checkpoint(
        config=config,
        tensors=read_tensors(file, config, FORMAT.name),
        provenance=_read_provenance(file),
        generation=checked_generation(read_own(file, GENERATION), f"{path}: {GENERATION}"),
        path=path,
        make_tokenizer=cache(partial(_read_tokenizer, file)),
    )


def _read_provenance(file: GgufFile) -> Provenance:
    data = file.metadata
    if (ours := Provenance.from_json(str(data.get(PROVENANCE)))) is not None:
        return ours
    named = (data.get(key) for key in (REPOSITORY, "general.name"))
    source = next((str(name) for name in named if name), file.path.stem)
    kinds = sorted({tensor.kind for tensor in file.tensors.values() if len(tensor.shape) == 2})
    license = str(data.get("general.license", ""))
    return Provenance(
        source=source, modifications=(f"stored as GGUF in {', '.join(kinds)}",)
    ).from_hub(source, "", license)


def _read_tokenizer(file: GgufFile) -> Tokenizer:
    """A SentencePiece model of the file's pieces, scores and kinds."""
    data, path = file.metadata, file.path
    if data.get(TOKENIZER_MODEL) != "llama":
        raise TokenizerError(
            f"{path}: {TOKENIZER_MODEL} is {data.get(TOKENIZER_MODEL)!r}, expected 'llama', as "
            "llama.cpp calls a SentencePiece model"
        )
    tokens, scores, kinds = (data.get(key, ()) for key in (TOKENS, SCORES, KINDS))
    for key, found in ((TOKENS, tokens), (SCORES, scores), (KINDS, kinds)):
        if isinstance(found, int | float | str | bytes):
            raise TokenizerError(f"{path}: {key} is one value, expected a list")
    if not len(tokens) == len(scores) == len(kinds) > 0:
        raise TokenizerError(
            f"{path}: has {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} types, "
            "expected as many of each"
        )
    try:
        pieces = [
            (_spelled(token.decode("utf-8"), kind), float(score), _kind(token, kind))
            for token, score, kind in zip(tokens, scores, map(int, kinds), strict=True)
        ]
        while pieces and pieces[-1][2] == PieceKind.UNUSED and pieces[-1][0].startswith(PAD_PIECE):
            pieces.pop()  # there for the embedding's rows
        return Tokenizer(sentencepiece_from_pieces(pieces))
    except (ValueError, AttributeError, TokenizerError) as error:
        raise TokenizerError(f"{path}: its tokenizer: {error}") from error


def _kind(token: bytes, kind: int) -> PieceKind:
    """llama.cpp's converter makes Gemma's reserved pieces control pieces; text may spell them."""
    reserved = kind == PieceKind.CONTROL and token.startswith(RESERVED.encode())
    return PieceKind.USER_DEFINED if reserved else PieceKind(kind)


def _spelled(piece: str, kind: int) -> str:
    """llama.cpp's converter spells the spaces of added pieces as spaces."""
    return piece.replace(" ", SPACE) if kind == PieceKind.USER_DEFINED else piece


FORMAT = Format(
    name="gguf", what="a .gguf file", suffix=".gguf",
    looks_like=lambda path: path.is_file() and begins_with(path, MAGIC), read=_read,
)  # fmt: skip
