"""From logits to one token: the options, and the sampler. It knows no engine."""

from gemma_multi.sampling.options import GenerationOptions
from gemma_multi.sampling.sampler import COLDEST, choose, lead, not_finite

__all__ = ["COLDEST", "GenerationOptions", "choose", "lead", "not_finite"]
