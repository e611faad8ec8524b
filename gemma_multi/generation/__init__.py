"""From logits to text: options, the sampler, the loop. Written once, above every engine."""

from gemma_multi.generation.loop import generate_tokens
from gemma_multi.generation.options import GenerationOptions
from gemma_multi.generation.result import GenerationResult, TextScore

__all__ = ["GenerationOptions", "GenerationResult", "TextScore", "generate_tokens"]
