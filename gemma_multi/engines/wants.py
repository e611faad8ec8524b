"""What a read is for, so that an engine computes nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from gemma_multi.engines.caches import SPARE
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.sampling import GenerationOptions, choose

_NOTHING_SEEN = np.zeros(0, np.int64)


class Want(Enum):
    """What a read is for."""

    NOTHING = "nothing"  # None
    LAST = "last"  # the logits after the last token, f32[V]
    ALL = "all"  # the logits after each token, f32[T, V]
    HIDDEN = "hidden"  # the last norm's output for the last token, f32[D], without the head


@dataclass(frozen=True, eq=False)
class Rows:
    """The logits of these tokens alone after the last token, `f32[len(ids)]`. On an engine that
    rounds activations in front of the head (LiteRT), they are nearer to exact than LAST's."""

    ids: np.ndarray

    def __post_init__(self) -> None:
        ids = np.asarray(self.ids)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise OptionError(
                f"rows are {ids.dtype} of shape {list(ids.shape)}, expected token ids in one row"
            )
        object.__setattr__(self, "ids", ids.astype(np.int64))


@dataclass(frozen=True, eq=False)
class Chosen:
    """The tokens that follow as `options` choose them, `i32[count]`, each read before the next is
    chosen: the session has then read what it was given and all of them but the last.

    They are fewer where no token can be chosen, because logits are not finite or more tokens are
    equals than a device looks at. Whoever wants the token after those reads the last of them (of
    what was given, where there are none), which the session has not read, for its logits.
    """

    options: GenerationOptions
    count: int  # 1 to SPARE: what is not used can be taken back
    vocabulary: int | None = None  # ids from here on are never chosen

    def __post_init__(self) -> None:
        if type(self.count) is not int or not 1 <= self.count <= SPARE:
            raise OptionError(f"count is {self.count!r}, expected a whole number 1 to {SPARE}")
        if self.options.repetition_penalty != 1:
            raise OptionError("a repetition penalty depends on all tokens; choose from logits")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise OptionError(f"vocabulary is {self.vocabulary}, expected at least 1")

    def choose(self, logits: np.ndarray, position: int) -> int | None:
        """The token of `f32[V]`, which will have the index `position`; None if there is none."""
        try:
            return choose(logits[: self.vocabulary], _NOTHING_SEEN, self.options, position)
        except BackendError:
            return None


NOTHING, LAST, ALL, HIDDEN = Want.NOTHING, Want.LAST, Want.ALL, Want.HIDDEN
Wanted = Want | Rows | Chosen
