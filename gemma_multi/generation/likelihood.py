"""How likely a model finds given tokens, as reads that a driver can run beside others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_multi.engines import ALL, Session
from gemma_multi.reads import Read, Reads

_CHUNK = 128  # positions whose logits are looked at together, at most 134 MB


def likelihoods(session: Session, ids: Sequence[int]) -> Reads[tuple[np.ndarray, np.ndarray]]:
    """The log-probability of each of `ids` but the first after what stands before it, `f64[T - 1]`,
    and whether it was the likeliest, `bool[T - 1]`. The session then has read all but the last."""
    logprobs, likeliest = [np.zeros(0)], [np.zeros(0, bool)]
    for start in range(0, len(ids) - 1, _CHUNK):
        targets = ids[start + 1 : start + 1 + _CHUNK]
        logits = yield Read(session, ids[start : start + len(targets)], ALL)
        some, best = pick_logprobs(logits, targets)
        logprobs.append(some)
        likeliest.append(best)
    return np.concatenate(logprobs), np.concatenate(likeliest)


def pick_logprobs(logits: np.ndarray, targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of `f32[T, V]`, the log-probability of each target and whether no token is likelier."""
    logits = logits - logits.max(axis=-1, keepdims=True)  # theirs may be read-only
    found = logits[np.arange(len(targets)), targets].astype(np.float64)
    totals = np.exp(logits, out=logits).sum(axis=-1, dtype=np.float64)
    return found - np.log(totals), found == 0
