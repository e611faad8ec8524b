"""embed: a text as a direction, for routing over many routes, retrieval, clusters.

The last norm's output, for the last token, which has read all others, or on average over all. A
causal model was not trained for this: within one task the direction is useful, and better after
fine-tuning on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_multi.engines import HIDDEN
from gemma_multi.errors import OptionError
from gemma_multi.progress import Progress, reporting
from gemma_multi.tasks.prompts import read_texts

if TYPE_CHECKING:
    from gemma_multi.model import Model

_POOLINGS = ("last", "mean")


def embed(
    model: Model, texts: str | Sequence[str], pooling: str = "last", progress: Progress = True
) -> np.ndarray:
    """See `Model.embed`."""
    if pooling not in _POOLINGS:
        raise OptionError(f"pooling is {pooling!r}, expected one of {', '.join(_POOLINGS)}")
    given, single = read_texts(texts, "texts")
    prompts = [model.encode(text, raw=True) for text in given]
    rows = np.zeros((len(prompts), model.config.hidden_size), np.float32)
    with reporting(progress, "embedding") as report:
        # those of one length in a row: engines compile for lengths
        for done, i in enumerate(sorted(range(len(prompts)), key=lambda i: len(prompts[i]))):
            rows[i] = _vector(model, prompts[i], pooling)
            report(done + 1, len(prompts))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows[0] if single else rows


def _vector(model: Model, ids: list[int], pooling: str) -> Any:
    if pooling == "last":
        return model.new_session().read(ids, HIDDEN)
    return model.engine.trace(ids)[-1].mean(axis=0)
