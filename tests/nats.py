"""How far apart two models' logits are."""

from __future__ import annotations

from typing import Any

import numpy as np


def divergence(reference: Any, other: Any) -> float:
    """Kullback-Leibler, mean nats a token, of logits `[T, V]`; in float64."""
    with np.errstate(invalid="ignore"):  # of what overflowed
        p, q = (
            x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
            for x in (np.asarray(reference, np.float64), np.asarray(other, np.float64))
        )
    return float((np.exp(p) * (p - q)).sum(-1).mean())
