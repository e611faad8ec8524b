"""embed: a text as a direction, for routing over many routes, retrieval, clusters.

The last norm's output, for the last token, which has read all others, or on average over all. A
causal model was not trained for this: within one task the direction is useful, and better after
fine-tuning on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma_multi.engines import HIDDEN
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress
from gemma_multi.reads import Read, Reads
from gemma_multi.sampling import not_finite
from gemma_multi.tasks.prompts import read_texts
from gemma_multi.tasks.running import run_all

if TYPE_CHECKING:
    from gemma_multi.model import Model

_POOLINGS = ("last", "mean")


def embed(
    model: Model, texts: str | Sequence[str], pooling: str = "last", progress: Progress = True
) -> np.ndarray:
    """See `Model.embed`."""
    given, single = read_texts(texts, "texts")
    embedder = by_pooling(model, pooling)
    jobs = [embedder(text) for text in given]
    # those of one length in a row: engines compile for lengths, and pad to the longest of a batch
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    found = run_all(model, [jobs[i] for i in order], single, "embedding", progress)
    if single:
        return np.asarray(found)
    rows = np.zeros((len(given), model.config.hidden_size), np.float32)
    for i, row in zip(order, found, strict=True):
        rows[i] = row
    return rows


def by_pooling(model: Model, pooling: str = "last") -> Callable[[str], Reads[np.ndarray]]:
    """The reads for a text, which raises OptionError where it is empty. Raises OptionError."""
    if pooling not in _POOLINGS:
        raise OptionError(f"pooling is {pooling!r}, expected one of {', '.join(_POOLINGS)}")

    def reads(ids: list[int]) -> Reads[np.ndarray]:
        if pooling == "last":
            vector = yield Read(model.new_session(), ids, HIDDEN)
        else:
            vector = model.engine.trace(ids)[-1].mean(axis=0)
        if not np.isfinite(vector).all():
            raise not_finite("hidden states")
        return vector / np.maximum(np.linalg.norm(vector), 1e-12)

    return lambda text: reads(model.encode(text, raw=True))
