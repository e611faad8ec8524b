"""What generation and scoring give back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GenerationResult:
    """A generated text and how it came to be."""

    text: str
    tokens: tuple[int, ...]  # generated ids, without the stop token
    finish_reason: Literal["stop", "length"]  # a stop token or text; or max_tokens or context
    prompt_tokens: int
    seed: int
    prefill_seconds: float  # to read the prompt
    decode_seconds: float  # to generate the tokens after the first

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; 0 when nothing was decoded."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TextScore:
    """How likely a model finds a text. Log-probabilities are natural."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, given those before it

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs))
