"""A vocabulary of fewer pieces: the rows of the embedding that a task reads and writes.

63% of Gemma 3 270M is its embedding. Text made of kept pieces gives the same tokens, renumbered,
and the same logits for them; all other text still encodes, in smaller pieces or bytes, and comes
back as it was.

Design choices:
- With a piece stay all that its merging goes through. SentencePiece merges the pair whose joined
  piece scores highest, and nothing that a text's merging made is ever undone; so what is left out
  was never made on the way, and where it is absent, nothing else is chosen than before.
- Control pieces, bytes, ASCII, line breaks and their like stay always, and so do the first unused
  pieces, which fine-tunes name anew; the 6,000 unused ones at the end of Gemma's vocabulary go.
- New ids are in the order of the old ones, so that the low ones, `<end_of_turn>` among them, keep
  theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint, rows_of
from gemma_multi.config import EMBEDDING
from gemma_multi.errors import OptionError
from gemma_multi.sentencepiece_model import SPACE, PieceKind
from gemma_multi.tokenizer import Tokenizer

_UNUSED, _FIRST_UNUSED = re.compile(r"<unused\d+>"), 1000
_ALWAYS = "user\nmodel\ndeveloper\n" + "".join(map(chr, range(32, 127)))


def trimmed(checkpoint: Checkpoint, wanted: Iterable[int], keep: int | None = None) -> Checkpoint:
    """The checkpoint with the pieces in `wanted`, in this order of preference, and what must stay
    with them; with `keep`, as many pieces as that, the vocabulary's most frequent filling up.

    Raises OptionError where `keep` is less than what must stay.
    """
    pieces = _Pieces(checkpoint.tokenizer.model, checkpoint.config.vocab_size)
    kept = pieces.indispensable(checkpoint.tokenizer) | pieces.known(_special_ids(checkpoint))
    if keep is not None and not len(kept) <= keep <= pieces.count:
        raise OptionError(f"keep is {keep}, expected {len(kept)} to {pieces.count} pieces")
    for one in wanted if keep is None else chain(wanted, pieces.by_frequency()):
        if one >= pieces.count:
            continue  # the model has no row for it
        more = {one, *pieces.on_the_way(one)} - kept
        if keep is None or len(kept) + len(more) <= keep:
            kept |= more
        elif len(kept) == keep:
            break
    ids = np.array(sorted(kept))
    new_ids = {int(old): new for new, old in enumerate(ids)}
    model = pieces.subset(ids)
    config = replace(
        checkpoint.config, vocab_size=len(ids),
        bos_token_id=new_ids[checkpoint.config.bos_token_id],
        pad_token_id=new_ids[checkpoint.config.pad_token_id],
        eos_token_ids=tuple(new_ids[i] for i in checkpoint.config.eos_token_ids if i in new_ids),
    )  # fmt: skip
    embedding = checkpoint.tensors[EMBEDDING]
    rows = rows_of(embedding, ids)
    how = f"vocabulary trimmed from {pieces.count:,} pieces to {len(ids):,}"
    return checkpoint.with_tensors({EMBEDDING: rows}, how).replace(
        config=config, generation=_renumbered(checkpoint.generation, new_ids),
        make_tokenizer=lambda: Tokenizer(model), path=None,
    )  # fmt: skip


class _Pieces:
    """A serialised SentencePiece model, to take pieces out of."""

    def __init__(self, model: bytes, rows: int) -> None:
        from sentencepiece import sentencepiece_model_pb2 as schema

        self._proto = schema.ModelProto()
        self._proto.ParseFromString(model)
        pieces = list(self._proto.pieces)[:rows]  # what has no row was never read
        self.count = len(pieces)
        self._texts = [p.piece for p in pieces]
        self._kinds = [PieceKind(p.type) for p in pieces]
        self._scores = [p.score for p in pieces]
        self._ids = {
            text: i for i, (text, kind) in enumerate(zip(self._texts, self._kinds, strict=True))
            if kind is PieceKind.NORMAL
        }  # fmt: skip

    def indispensable(self, tokenizer: Tokenizer) -> set[int]:
        """What stays whatever is asked for."""
        always = {
            i for i, (text, kind) in enumerate(zip(self._texts, self._kinds, strict=True))
            if kind is not PieceKind.NORMAL and (i < _FIRST_UNUSED or not _UNUSED.fullmatch(text))
        }  # fmt: skip
        for text in _ALWAYS.replace(" ", SPACE):
            if text in self._ids:
                always.add(self._ids[text])
        for one in tokenizer.encode(_ALWAYS):
            always |= {one, *self.on_the_way(one)}
        return always

    def known(self, ids: Iterable[int]) -> set[int]:
        """Those of `ids` that have a row, and what their merging goes through."""
        given = {one for one in ids if one < self.count}
        return given | {part for one in given for part in self.on_the_way(one)}

    def by_frequency(self) -> list[int]:
        """Normal pieces, those that were merged first in training first."""
        return sorted(self._ids.values(), key=lambda i: -self._scores[i])

    def on_the_way(self, one: int) -> Iterator[int]:
        """The pieces that the merging of a normal piece goes through, its letters among them."""
        if self._kinds[one] is not PieceKind.NORMAL:
            return
        parts = list(self._texts[one])
        yield from (self._ids[part] for part in parts if part in self._ids)
        while len(parts) > 1:
            joined = [self._ids.get(a + b, -1) for a, b in pairwise(parts)]
            best = max(range(len(joined)), key=lambda at: self._score(joined[at]))
            if joined[best] < 0:
                return  # no text makes this piece
            yield joined[best]
            parts[best : best + 2] = [self._texts[joined[best]]]

    def _score(self, one: int) -> float:
        return self._scores[one] if one >= 0 else -np.inf

    def subset(self, ids: np.ndarray) -> bytes:
        """The model with these pieces alone."""
        from sentencepiece import sentencepiece_model_pb2 as schema

        proto = schema.ModelProto()
        proto.CopyFrom(self._proto)
        pieces = [self._proto.pieces[i] for i in ids.tolist()]
        del proto.pieces[:]
        proto.pieces.extend(pieces)
        places = {piece.piece: i for i, piece in enumerate(pieces)}
        trainer = proto.trainer_spec
        trainer.vocab_size = len(pieces)
        for name in ("pad", "eos", "bos", "unk"):
            if f"<{name}>" in places:
                setattr(trainer, f"{name}_id", places[f"<{name}>"])
        return bytes(proto.SerializeToString())


def _special_ids(checkpoint: Checkpoint) -> set[int]:
    """What configs name: the tokens that begin, pad and end."""
    config, found = checkpoint.config, set(checkpoint.stop_ids)
    found |= {config.bos_token_id, config.pad_token_id}
    for name, value in checkpoint.generation.items():
        if name.endswith("_token_id"):
            found |= {i for i in (value if isinstance(value, list) else [value]) if i is not None}
    return found


def _renumbered(generation: Any, new_ids: dict[int, int]) -> dict[str, Any]:
    """generation_config.json with its token ids as they are now."""

    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new_ids[i] for i in value if i in new_ids]
        return new_ids.get(value, value)

    return {n: new(v) if n.endswith("_token_id") else v for n, v in generation.items()}
