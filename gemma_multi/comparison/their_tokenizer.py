"""Hugging Face's tokenizer of a model, so that someone else's code is the reference for ids too."""

from __future__ import annotations

from collections.abc import Iterable

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError
from gemma_multi.formats.keras import is_preset
from gemma_multi.tokenizer import Tokenizer


class TheirTokenizer(Tokenizer):
    """Encodes and decodes by transformers; pieces and special ids are looked up in ours."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoTokenizer

        super().__init__(checkpoint.tokenizer.model)
        path = checkpoint.path
        if path is None or not path.is_dir() or is_preset(path):
            raise CheckpointError(
                "transformers needs a model directory with its tokenizer, received "
                f"{path or 'a checkpoint in memory'}"
            )
        # from a tokenizer.model it would let a text spell these, even when told to split them
        control = [self.piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
        self._theirs = AutoTokenizer.from_pretrained(str(path))
        self._theirs.backend_tokenizer.add_special_tokens(control)

    def encode(self, text: str | bytes) -> list[int]:
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        text = text.encode(errors="replace").decode()  # theirs refuses lone surrogates
        ids: list[int] = self._theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        spoken = [token for token in ids if self.token_bytes(token)]  # no control tokens
        text: str = self._theirs.decode(spoken)
        return text
