"""From tokens to an answer: the decoding state, the reads of an answer, the result."""

from gemma_multi.generation.decoding import Decoding
from gemma_multi.generation.lookup import PromptLookup
from gemma_multi.generation.loop import answer, generate_tokens
from gemma_multi.generation.result import FinishReason, GenerationResult, TextScore, TokenLogprobs

__all__ = [
    "Decoding",
    "FinishReason",
    "GenerationResult",
    "PromptLookup",
    "TextScore",
    "TokenLogprobs",
    "answer",
    "generate_tokens",
]
