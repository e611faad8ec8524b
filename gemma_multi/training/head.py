"""The loss over a vocabulary of 262,144, a few positions at a time.

Logits of 4 x 512 tokens would be 2 GB in float32, and so would their gradient. Here only the
positions on which a loss is taken are looked at, some hundred at a time, and a chunk's gradients
are made together with its loss: the gradient of cross-entropy is `softmax - target`, so nothing
has to be computed twice or kept. This is one chunk; each engine loops over chunks in its own way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class ChunkLoss(NamedTuple):
    loss: Array  # f32, summed over the chunk
    hidden: Array | None  # its gradient by hidden, [C, D]
    logits: Array | None  # its gradient by the logits, [C, V]; times hidden, the embedding's


def chunk_loss(
    xp: Any,
    hidden: Array,
    embedding: Array,
    labels: Array,
    teacher: tuple[Array, Array] | None = None,
    log_weights: Array | None = None,
    *,
    gradient: bool = True,
) -> ChunkLoss:
    """Cross-entropy of `C` positions: hidden `[C, D]`, embedding `[V, D]`, labels `i32[C]`, those
    below 0 ignored. With a teacher's (hidden, embedding) the loss is the divergence
    KL(teacher || student) instead, in nats as well; with `log_weights` `f32[V]` (of a `Vocabulary`)
    each row of the two embeddings counts for as many words as that says."""
    counted = (labels >= 0)[:, None]
    logits, total = _logits(xp, hidden, embedding, log_weights)
    if teacher is None:
        vocabulary = xp.arange(embedding.shape[0])
        target = vocabulary[None, :] == labels[:, None]
        losses = total - xp.take_along_axis(logits, xp.maximum(labels, 0)[:, None], axis=-1)
    else:
        theirs, their_total = _logits(xp, *teacher, log_weights)
        target = xp.exp(theirs - their_total)
        gap = (theirs - their_total) - (logits - total)
        losses = xp.sum(target * gap, axis=-1, keepdims=True)
    loss = xp.sum(xp.where(counted, losses, 0.0))
    if not gradient:
        return ChunkLoss(loss, None, None)
    difference = xp.exp(logits - total) - target.astype(xp.float32)
    difference = xp.where(counted, difference, 0.0).astype(embedding.dtype)
    return ChunkLoss(loss, difference @ embedding, difference)


def _logits(
    xp: Any, hidden: Array, embedding: Array, log_weights: Array | None
) -> tuple[Array, Array]:
    """(`f32[C, V]`, the logarithm of the sum of their exponentials `f32[C, 1]`)."""
    logits = (hidden @ embedding.T).astype(xp.float32)
    if log_weights is not None:
        logits = logits + log_weights
    largest = xp.max(logits, axis=-1, keepdims=True)
    total = xp.log(xp.sum(xp.exp(logits - largest), axis=-1, keepdims=True))
    return logits, largest + total
