"""Our tokenizer, as llguidance wants it: the bytes of every token.

Bytes and not SentencePiece pieces: a grammar over pieces that spell a space as `▁` can never let a
space through. Control pieces have no bytes that text could match; a grammar reaches them only by
name (`<start_of_turn>`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from gemma_multi.tokenizer import Tokenizer


@lru_cache(maxsize=2)  # 262,144 tokens take a second, and 50 MB
def llguidance_tokenizer(tokenizer: Tokenizer, stop_ids: frozenset[int]) -> Any:
    """An `llguidance.LLTokenizer`; where a text may end, it may end with any of `stop_ids`."""
    from llguidance import LLTokenizer

    wrapper: Any = _Wrapper(tokenizer)
    return LLTokenizer(wrapper, eos_token=sorted(stop_ids))


class _Wrapper:
    """The attributes by which LLTokenizer knows a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        for i in self.special_token_ids:
            self.tokens[i] = tokenizer.piece(i).encode()

    def __call__(self, text: str) -> Iterable[int]:
        """What the grammar forces is tokenised as a prompt would be."""
        return self._tokenizer.encode(text)
