"""What generation and scoring give back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "closed", "cancelled"]


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a model found a token that was chosen, and others in its place. Natural
    logarithms, over the whole vocabulary."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first

    @classmethod
    def of(cls, token: int, logits: np.ndarray, count: int) -> TokenLogprobs:
        """Of `f32[V]`."""
        highest = float(logits.max())
        total = highest + math.log(np.exp(logits - highest).sum(dtype=np.float64))
        best = np.argpartition(-logits, min(count, len(logits) - 1))[:count]
        best = best[np.lexsort((best, -logits[best]))]  # of equals, the lower id
        top = tuple((int(one), float(logits[one]) - total) for one in best)
        return cls(token, float(logits[token]) - total, top)


@dataclass(frozen=True)
class GenerationResult:
    """A generated text and how it came to be."""

    text: str
    tokens: tuple[int, ...]  # generated ids, without a stop token, but with those of a stop text
    # "stop": a stop token or text; "length": max_tokens or the context; "closed": the stream was
    # closed; "cancelled": by another thread
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    prefill_seconds: float  # to read the prompt
    decode_seconds: float  # to generate the tokens after the first
    parsed: Any = None  # what a constrained text means: the object of a schema, else the text
    calls: tuple[Any, ...] = ()  # of tools: `Call`s, whose text is in none of the above
    forced_tokens: int = 0  # generated ones that a constraint left no choice about
    reused_tokens: int = 0  # of the prompt, read for an earlier one
    guessed_tokens: int = 0  # generated ones that prompt lookup guessed: read several at a time
    # indices into `tokens` (or their end) where, after a guess, the two best logits of a greedy
    # answer were so close that plain decoding, whose sums have another order, may choose the other
    near_ties: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each of `tokens`, if they were asked for

    @property
    def generated_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: the first token comes from the prompt and is not counted."""
        decoded = len(self.tokens) - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds else 0.0

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
