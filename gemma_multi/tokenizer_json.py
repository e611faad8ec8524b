"""`tokenizer.json`, made from a SentencePiece model: for programs that read nothing else.

Hugging Face's `tokenizers` merges the pair that is listed first, SentencePiece the one whose joined
piece scores highest. So the pieces are listed by their scores, each with all the ways to cut it in
two, which leaves nothing to chance: of one piece, any way is as good. What SentencePiece takes as a
whole wherever it stands (user-defined pieces) is an added token. `sentencepiece_model` goes the
other way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from gemma_multi.errors import TokenizerError
from gemma_multi.sentencepiece_model import SPACE, STEERING_PIECES, UNKNOWN, PieceKind

BOS = "<bos>"
_ADDED = (PieceKind.CONTROL, PieceKind.UNKNOWN, PieceKind.USER_DEFINED)
# Turns as `chat_template` writes them, for programs that run Jinja; content may come in parts.
CHAT_TEMPLATE = r"""{{ bos_token }}
{%- set start = 0 -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set start = 1 -%}
{%- if messages[0].content is string -%}
{%- set system = messages[0].content + "\n\n" -%}
{%- else -%}
{%- set system = messages[0].content[0].text + "\n\n" -%}
{%- endif -%}
{%- endif -%}
{%- for message in messages[start:] -%}
{%- if (message.role == "user") != (loop.index0 % 2 == 0) -%}
{{ raise_exception("expected the turns of user and assistant one after the other") }}
{%- endif -%}
{{ "<start_of_turn>" + ("user" if message.role == "user" else "model") + "\n" }}
{%- if loop.first -%}{{ system }}{%- endif -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}
{%- endif -%}
{{ "<end_of_turn>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\n" }}{%- endif -%}
"""


def tokenizer_json(sentencepiece: bytes, rows: int | None = None) -> bytes:
    """The file for a serialised SentencePiece model: the same ids for the same text, but that
    `<bos>` comes first, and that text may spell the pieces that steer a conversation, as chat
    templates need it. `rows` are the model's: pieces beyond them are left out, which some
    tokenizers have.

    Raises TokenizerError for a model that `tokenizers` would not follow.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()
    proto.ParseFromString(sentencepiece)
    _check_kind(proto)
    pieces = [(piece.piece, piece.score, PieceKind(piece.type)) for piece in proto.pieces][:rows]
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    if BOS not in ids:
        raise TokenizerError(f"the vocabulary has no piece {BOS!r}; is it Gemma's?")
    space = {"String": " "}
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(i, piece, kind) for i, (piece, _, kind) in enumerate(pieces) if kind in _ADDED
        ],
        "normalizer": {"type": "Replace", "pattern": space, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": _beginning(ids[BOS]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": list(_merges(pieces, ids)),
        },
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def tokenizer_config(context_length: int) -> dict[str, Any]:
    """`tokenizer_config.json` beside it: the special tokens, and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": BOS,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": UNKNOWN,
        "padding_side": "left",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _check_kind(proto: Any) -> None:
    """Refuses what is no byte-fallback BPE over the text as it is."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != 2 or not trainer.byte_fallback:  # 2: BPE
        raise TokenizerError(
            f"tokenizer.model has model_type {trainer.model_type} (byte_fallback "
            f"{trainer.byte_fallback}), expected Gemma's byte-fallback BPE"
        )
    for rule in ("add_dummy_prefix", "remove_extra_whitespaces", "precompiled_charsmap"):
        if getattr(normalizer, rule):
            raise TokenizerError(
                f"tokenizer.model changes text before it is cut ({rule}), which Gemma's does not"
            )


def _added(token: int, piece: str, kind: PieceKind) -> dict[str, Any]:
    return {
        "id": token,
        "content": piece,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": SPACE in piece,  # found where the normaliser has made spaces of it
        "special": kind is not PieceKind.USER_DEFINED or piece in STEERING_PIECES,
    }


def _beginning(bos: int) -> dict[str, Any]:
    """`<bos>` in front of every text."""

    def text(name: str, place: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": BOS, "type_id": place}},
                {"Sequence": {"id": name, "type_id": place}}]  # fmt: skip

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }


def _merges(
    pieces: list[tuple[str, float, PieceKind]], ids: dict[str, int]
) -> Iterator[tuple[str, str]]:
    """Every pair whose joined text is a normal piece, that of the highest score first."""
    normal = [(-score, i) for i, (_, score, kind) in enumerate(pieces) if kind is PieceKind.NORMAL]
    letters = {piece for piece in ids if len(piece) == 1}
    for _, i in sorted(normal):
        piece = pieces[i][0]
        if len(piece) > 1 and not letters.issuperset(piece):
            raise TokenizerError(
                f"tokenizer.model makes the piece {piece!r} of a letter that is no piece, which a "
                "tokenizer.json cannot say"
            )
        cuts = []
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in ids and right in ids:
                cuts.append((ids[left], ids[right], left, right))
        cuts.sort()
        yield from ((left, right) for _, _, left, right in cuts)
