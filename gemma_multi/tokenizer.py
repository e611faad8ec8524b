"""One SentencePiece tokenizer for every engine.

Design choices:
- SentencePiece from `tokenizer.model`: it loads in a twentieth of the time and a fifth of the
  memory that the Hugging Face tokenizer needs for the same 262,144 pieces, and gives the same ids.
- A checkpoint that has only `tokenizer.json` gets a SentencePiece model built from it, once,
  kept in the user's cache under the hash of that file.
- Pieces that steer a conversation (`<start_of_turn>` and its kin) are control pieces here, which
  text can never produce: text that spells `<end_of_turn>` stays text. Only `chat_template` writes
  them.
- Decoding joins bytes, then reads UTF-8, so a character that spans tokens comes out whole.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import mmap
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from gemma_multi.cache import TOKENIZERS, writable_cache
from gemma_multi.errors import TokenizerError
from gemma_multi.files import write_atomically
from gemma_multi.sentencepiece_model import (
    FUNCTION_PIECES,
    sentencepiece_from_json,
    with_silent_steering_pieces,
)

_DIGEST = 32  # bytes of a SHA-256
_BUILDER = 2  # of the cached models; raise it when `sentencepiece_from_json` changes its answer
_BROKEN = re.compile("[\ud800-\udfff]+")


class Tokenizer:
    """Text to token ids and back. `encode` adds no special token; `chat_template` does that."""

    def __init__(self, model: bytes) -> None:
        """`model` is a serialised SentencePiece model, as in a `tokenizer.model` file."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(with_silent_steering_pieces(model))
        except Exception as error:  # the binding raises RuntimeError and its kin
            raise TokenizerError(f"not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id = self.id("<pad>")
        self.eos_id = self.id("<eos>")
        self.bos_id = self.id("<bos>")
        self.start_of_turn_id = self.id("<start_of_turn>")
        self.end_of_turn_id = self.id("<end_of_turn>")
        self._bytes: dict[int, bytes] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.model == other.model

    def __hash__(self) -> int:
        return hash(self.model)

    @property
    def has_function_pieces(self) -> bool:
        """Whether it is FunctionGemma's, with tokens for declarations, calls and responses."""
        known = (self._processor.piece_to_id(piece) for piece in FUNCTION_PIECES)
        return self._processor.unk_id() not in known

    @classmethod
    def from_directory(cls, path: str | Path, vocab_size: int = 0) -> Tokenizer:
        """Reads `tokenizer.model`, or builds it from `tokenizer.json`.

        `vocab_size` is the model's: fine-tunes that add tokens update `tokenizer.json` and often
        leave the old `tokenizer.model` beside it, so the one that has enough pieces is taken, and
        the names of those that FunctionGemma uses.
        """
        path = Path(path)
        model, source = path / "tokenizer.model", path / "tokenizer.json"
        try:
            found = cls(model.read_bytes()) if model.is_file() else None
            if found is None or (source.is_file() and found._is_older(source, vocab_size)):
                if not source.is_file():
                    raise TokenizerError("has neither tokenizer.model nor tokenizer.json")
                built = cls(_cached_model(source.read_bytes()))
                if found is None or built._knows_more_than(found):
                    return built
            return found
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error
        except OSError as error:
            raise TokenizerError(f"{path}: tokenizer cannot be read: {error}") from error

    def _is_older(self, tokenizer_json: Path, vocab_size: int) -> bool:
        """Whether a `tokenizer.json` beside the model has more pieces, or FunctionGemma's names."""
        if self.vocab_size < vocab_size:
            return True
        if self.has_function_pieces or not tokenizer_json.stat().st_size:
            return False
        with (  # 33 MB of Gemma's, which are looked through at every load and not read in
            tokenizer_json.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return data.find(f'"{FUNCTION_PIECES[0]}"'.encode()) >= 0

    def _knows_more_than(self, other: Tokenizer) -> bool:
        """Else a model with more rows than there are pieces would never keep its own."""
        more_names = self.has_function_pieces and not other.has_function_pieces
        return self.vocab_size > other.vocab_size or more_names

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`, with nothing added.

        Bytes that are not UTF-8 become byte pieces, so `decode_bytes` gives them back. (A `str`
        holds such bytes as Python's surrogate escapes; other lone surrogates become U+FFFD.)
        """
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if not _BROKEN.search(text):
            return self._processor.encode(text)
        ids: list[int] = []
        position = 0
        for broken in _BROKEN.finditer(text):
            ids += self._processor.encode(text[position : broken.start()])
            for character in broken.group():
                if "\udc80" <= character <= "\udcff":
                    ids.append(self.id(f"<0x{ord(character) - 0xDC00:02X}>"))
                else:
                    ids += self._processor.encode("\ufffd")
            position = broken.end()
        return ids + self._processor.encode(text[position:])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens are left out, broken UTF-8 reads as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; control tokens are left out."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text; nothing for a control token."""
        token = int(token)
        cached = self._bytes.get(token)
        if cached is None:
            cached = self._bytes[token] = self._read_piece(token)
        return cached

    def _read_piece(self, token: int) -> bytes:
        piece = self.piece(token)
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def piece(self, token: int) -> str:
        """The vocabulary entry behind an id, for example `'\u2581the'`."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(
                f"token id {token} is outside the vocabulary of {self.vocab_size} pieces"
            )
        return self._processor.id_to_piece(token)

    def id(self, piece: str) -> int:
        """The id of a vocabulary entry. Raises TokenizerError when there is none."""
        found = self._processor.piece_to_id(piece)
        if found == self._processor.unk_id() and piece != "<unk>":
            raise TokenizerError(f"the vocabulary has no piece {piece!r}; is it Gemma's?")
        return found

    def stream(self) -> TokenDecoder:
        return TokenDecoder(self)


class TokenDecoder:
    """Turns tokens into text as they come, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What was held back; a character that was never completed reads as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _cached_model(tokenizer_json: bytes) -> bytes:
    """The SentencePiece model for a `tokenizer.json`, built at most once on this machine.

    Its own hash stands behind it: a file that was damaged since is built again.
    """
    kept = writable_cache(TOKENIZERS)
    if kept is None:
        return sentencepiece_from_json(tokenizer_json)
    path = kept / f"{hashlib.sha256(tokenizer_json).hexdigest()[:32]}-{_BUILDER}.model"
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        model, digest = data[:-_DIGEST], data[-_DIGEST:]
        if hashlib.sha256(model).digest() == digest:
            return model
    model = sentencepiece_from_json(tokenizer_json)
    with contextlib.suppress(OSError):  # without the cache, the next load only takes longer
        write_atomically(path, model, hashlib.sha256(model).digest())
    return model
