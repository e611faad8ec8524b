"""The validation loss of a loaded model, on the engine that will run it.

Training measures its loss inside its own compiled step. This measures the same number from the
outside, from an engine's logits, so that what was trained and what ships can be held together.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.model import Model
from gemma_multi.training.examples import prepare
from gemma_multi.training.rows import Data


@dataclass(frozen=True)
class ValidationLoss:
    """`loss` is in nats, the mean over `tokens`."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def validation_loss(
    model: Model, data: Data, *, max_length: int = 512, loss_on: str = "answer"
) -> ValidationLoss:
    """The loss of `model` on rows as `finetune` takes them; it should say what the model says.
    Raises DataError for rows that cannot be used."""
    total, count = 0.0, 0
    with tempfile.TemporaryDirectory() as directory:
        examples = prepare(data, model.tokenizer, Path(directory, "rows.i32"),
                           max_length=max_length, loss_on=loss_on)  # fmt: skip
        for i in range(len(examples)):
            tokens, wanted = examples.example(i)
            losses = -model.logprobs(tokens)[wanted[1:]]
            total += float(losses.sum())
            count += len(losses)
        del tokens, wanted, examples  # the mapped file is to be removed
    return ValidationLoss(total / max(1, count), count)
