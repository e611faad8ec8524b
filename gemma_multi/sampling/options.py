"""GenerationOptions: what a caller may ask of generation, checked before anything runs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_multi.errors import OptionError
from gemma_multi.options import option, refuse_unknown

DEFAULT_MAX_TOKENS = 512
MAX_LOGPROBS = 20
_FROM_CHECKPOINT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationOptions:
    """How to choose tokens and when to stop. What a field means stands beside it."""

    max_tokens: int = option(DEFAULT_MAX_TOKENS, "The most tokens to generate.")
    temperature: float = option(1.0, "Divides the logits; 0 always takes the best token (greedy).")
    top_k: int = option(64, "Keep only the k best tokens; 0 keeps all.")
    top_p: float = option(
        0.95, "Keep the best tokens that together have this probability; 1 keeps all."
    )
    min_p: float = option(
        0.0, "Drop tokens below this share of the best one's probability; 0 keeps all."
    )
    repetition_penalty: float = option(
        1.0, "Divides the positive logits of tokens seen before, multiplies the negative ones; 1 "
        "leaves them."
    )  # fmt: skip
    seed: int | None = option(None, "The same seed gives the same text; one is drawn if unset.")
    prompt_lookup: bool | None = option(
        None, "Guess several tokens where the text repeats what stood before, and read them at "
        "once; if unset, where tokens are chosen greedily and the backend gains from it."
    )  # fmt: skip
    logprobs: int | None = option(
        None, "Also give the log-probability of each token, as the model has it before any option, "
        "and of so many of the likeliest beside it."
    )  # fmt: skip
    stop: tuple[str, ...] = option(
        (), "Texts that end generation and are not part of the result; may be repeated."
    )

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1)
        _real("temperature", self.temperature, 0, math.inf)
        _whole("top_k", self.top_k, 0)
        _real("top_p", self.top_p, 0, 1, open_at_least=True)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(32))
        _whole("seed", self.seed, 0, most=(1 << 64) - 1)
        if self.prompt_lookup is not None and not isinstance(self.prompt_lookup, bool):
            raise OptionError(f"prompt_lookup is {self.prompt_lookup!r}, expected True or False")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, most=MAX_LOGPROBS)
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise OptionError(f"stop is {self.stop!r}, expected texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))

    @classmethod
    def merge(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> GenerationOptions:
        """A caller's options over a checkpoint's `generation_config.json`."""
        refuse_unknown(cls, given)
        chosen = {n: defaults[n] for n in _FROM_CHECKPOINT if defaults.get(n) is not None}
        if defaults.get("do_sample") is False:
            chosen["temperature"] = 0.0
        if defaults.get("max_new_tokens") is not None:
            chosen["max_tokens"] = defaults["max_new_tokens"]
        try:
            cls(**chosen)
        except OptionError as error:
            raise OptionError(f"the checkpoint's generation_config.json: {error}") from error
        return cls(**{**chosen, **{n: v for n, v in given.items() if v is not None}})


def _whole(name: str, value: Any, least: int, most: float = math.inf) -> None:
    bounds = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise OptionError(f"{name} is {value!r}, expected a whole number of {bounds}")


def _real(name: str, value: Any, least: float, most: float, open_at_least: bool = False) -> None:
    bounds = f"{'above' if open_at_least else 'at least'} {least}"
    if most < math.inf:
        bounds += f" and at most {most}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"{name} is {value!r}, expected a number {bounds}")
    low = value <= least if open_at_least else value < least
    if not math.isfinite(value) or low or value > most:
        raise OptionError(f"{name} is {value!r}, expected a number {bounds}")
