"""A serialised SentencePiece model: made from other programs' vocabularies, changed in place.

A checkpoint that comes without `tokenizer.model` has the same facts elsewhere: pieces, their
scores, and what kind each is. Here they become the one form that every engine's tokenizer reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from gemma_multi.errors import TokenizerError

# FunctionGemma's; where there are these, a model calls functions in its own way
FUNCTION_PIECES = (
    "<start_function_declaration>",
    "<end_function_declaration>",
    "<start_function_call>",
    "<end_function_call>",
    "<start_function_response>",
    "<end_function_response>",
    "<escape>",
)
STEERING_PIECES = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    *FUNCTION_PIECES,
)
UNKNOWN = "<unk>"
SPACE = "\u2581"  # what pieces spell a space as


class PieceKind(IntEnum):
    """As sentencepiece_model.proto and GGUF number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def with_spoken_steering_pieces(model: bytes) -> bytes:
    """A serialised model in which text can spell the steering pieces.

    Engines that write a conversation's markers as text, such as LiteRT-LM, need it so; a model
    built from `tokenizer.json` has them as control pieces.
    """
    return _change_steering_pieces(model, PieceKind.CONTROL, PieceKind.USER_DEFINED)


def with_silent_steering_pieces(model: bytes) -> bytes:
    """A serialised model in which no text can spell the steering pieces."""
    return _change_steering_pieces(model, PieceKind.USER_DEFINED, PieceKind.CONTROL)


def _change_steering_pieces(model: bytes, old: PieceKind, new: PieceKind) -> bytes:
    """The model with its steering pieces of kind `old` made `new`.

    A SentencePiece entry is `0A len | 0A len piece | 15 score(4) | 18 type`; the type byte is
    changed in place, because parsing and writing 262,144 entries would take a second.
    """
    for piece in STEERING_PIECES:
        name = piece.encode()
        entry = bytes([0x0A, len(name)]) + name + b"\x15"
        start = model.find(entry)
        if start < 0:
            continue
        kind = start + len(entry) + 4
        if model[kind : kind + 2] == bytes([0x18, old]):
            model = b"".join((model[: kind + 1], bytes([new]), model[kind + 2 :]))
    return model


def sentencepiece_from_pieces(pieces: Iterable[tuple[str, float, PieceKind]]) -> bytes:
    """A byte-fallback BPE model of these pieces with their scores, in the order of their ids.

    Of two pairs the one whose joined piece scores highest is merged first.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    ids: dict[str, int] = {}
    for piece, score, kind in pieces:
        ids[piece] = len(ids)
        if piece == UNKNOWN:  # llama.cpp's files call it a control piece; LiteRT-LM refuses that
            kind = PieceKind.UNKNOWN
        proto.pieces.add(piece=piece, score=score, type=int(kind))
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = 2, len(ids), True  # 2: BPE
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = (
        ids.get(special, -1) for special in ("<pad>", "<eos>", "<bos>", UNKNOWN)
    )
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece = "<pad>", "<eos>", "<bos>"
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(proto.SerializeToString())


def sentencepiece_from_json(tokenizer_json: bytes) -> bytes:
    """A SentencePiece model that encodes as a byte-fallback BPE `tokenizer.json` does.

    SentencePiece merges the pair whose joined piece scores highest; Hugging Face the pair listed
    first. So a piece scores minus the rank of the first merge that makes it.
    """
    try:
        return _build(json.loads(tokenizer_json))
    except TokenizerError as error:
        raise TokenizerError(f"tokenizer.json: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"tokenizer.json: not a Hugging Face tokenizer: {error!r}") from error


def _build(data: dict[str, Any]) -> bytes:
    _check_kind(data)
    vocab = dict(data["model"]["vocab"])
    added = {}
    for token in data.get("added_tokens") or ():
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise TokenizerError(f"added token {token['content']!r} strips its surroundings")
        vocab[token["content"]] = token["id"]
        added[token["content"]] = (
            PieceKind.CONTROL if token.get("special") else PieceKind.USER_DEFINED
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError("its token ids are not 0, 1, 2, ... without a gap")
    score: dict[str, int] = {}
    splits: dict[str, int] = {}  # merges that are listed for a piece
    for rank, merge in enumerate(data["model"]["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score.setdefault(left + right, -rank)
        splits[left + right] = splits.get(left + right, 0) + 1
    _check_splits(data["model"]["vocab"], splits)

    def kind_of(piece: str) -> PieceKind:
        if piece in added:
            return added[piece]
        if re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return PieceKind.BYTE
        if len(piece) > 1 and piece not in score:
            raise TokenizerError(f"no merge makes the piece {piece!r}")
        return PieceKind.NORMAL

    return sentencepiece_from_pieces(
        # only the vocabulary's own pieces spell a space as U+2581 in the file
        (
            piece.replace(" ", SPACE) if piece in added else piece,
            score.get(piece, 0),
            kind_of(piece),
        )
        for piece in sorted(vocab, key=vocab.__getitem__)
    )


def _check_splits(vocab: dict[str, int], splits: dict[str, int]) -> None:
    """Refuses a tokenizer that lists only some of the ways to make a piece. Hugging Face merges
    the listed pairs, SentencePiece any pair whose joined text is a piece."""
    for piece, listed in splits.items():
        possible = sum(piece[:i] in vocab and piece[i:] in vocab for i in range(1, len(piece)))
        if listed < possible:
            raise TokenizerError(
                f"its merges leave out {possible - listed} of {possible} ways to make the piece "
                f"{piece!r}, which a SentencePiece model would take"
            )


def _check_kind(data: dict[str, Any]) -> None:
    """Refuses what a byte-fallback BPE model without further rules would not reproduce."""
    model = data["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise TokenizerError(
            f"a {model['type']} model (byte_fallback {model.get('byte_fallback')}), expected "
            "Gemma's byte-fallback BPE"
        )
    for rule in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(rule):
            raise TokenizerError(f"its model has {rule} {model[rule]!r}, expected none")
    space = {"String": " "}
    for step, expected in (
        ("normalizer", {"type": "Replace", "pattern": space, "content": "\u2581"}),
        ("pre_tokenizer", {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious",
                           "invert": False}),
    ):  # fmt: skip
        # Gemma's pre-tokenizer splits at spaces, of which its normaliser has left none
        if data.get(step) != expected and not (step == "pre_tokenizer" and data.get(step) is None):
            raise TokenizerError(f"its {step} is {data.get(step)!r}, expected Gemma's")
