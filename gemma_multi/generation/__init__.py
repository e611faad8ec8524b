"""From tokens to an answer: the decoding state, the loop that drives an engine, the result."""

from gemma_multi.generation.decoding import Decoding
from gemma_multi.generation.lookup import PromptLookup
from gemma_multi.generation.loop import Timing, generate_tokens
from gemma_multi.generation.result import FinishReason, GenerationResult, TextScore

__all__ = [
    "Decoding",
    "FinishReason",
    "GenerationResult",
    "PromptLookup",
    "TextScore",
    "Timing",
    "generate_tokens",
]
