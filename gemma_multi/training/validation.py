"""The validation loss of a loaded model, on the engine that will run it.

Training measures its loss inside its own compiled step. This measures the same number from the
outside, from an engine's logits, so that what was trained and what ships can be held together.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.progress import Progress, reporting
from gemma_multi.rows import Data
from gemma_multi.sources import Source
from gemma_multi.training.examples import Examples, prepare


@dataclass(frozen=True)
class ValidationLoss:
    """`loss` is in nats, the mean over `tokens`."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def validation_loss(
    model: Source, data: Data, *, max_length: int = 512, loss_on: str = "answer",
    revision: str | None = None, local_files_only: bool = False, progress: Progress = True,
) -> ValidationLoss:  # fmt: skip
    """The loss of `model` on rows as `finetune` takes them.

    model, revision, local_files_only: a loaded Model, or what `load` takes, which is then loaded as
        `load` does by itself.
    progress: True for a bar on a terminal, False for none, or a function of (done, total) rows.

    Raises DataError for rows that cannot be used, and what `load` raises.
    """
    if not isinstance(model, Model) or revision is not None:
        model = load(model, revision=revision, local_files_only=local_files_only, progress=progress)
    found = list(row_losses(model, data, max_length, loss_on, progress=progress))
    count = sum(tokens for _, tokens in found)
    return ValidationLoss(sum(loss for loss, _ in found) / max(1, count), count)


def row_losses(
    model: Model, data: Data, max_length: int = 512, loss_on: str = "answer", first: int = 0,
    progress: Progress = True,
) -> Iterator[tuple[float, int]]:  # fmt: skip
    """(the sum of its losses in nats, over how many tokens) of each row from the `first` on."""
    with tempfile.TemporaryDirectory() as directory:
        examples = prepare(data, model.tokenizer, Path(directory, "rows.i32"),
                           max_length=max_length, loss_on=loss_on)  # fmt: skip
        yield from _losses(model, examples, first, progress)
        del examples  # the mapped file is to be removed


def _losses(
    model: Model, examples: Examples, first: int, progress: Progress
) -> Iterator[tuple[float, int]]:
    with reporting(progress, "validating") as report:
        for i in range(first, len(examples)):
            tokens, loss_mask = examples.example(i)
            losses = -model.logprobs(tokens)[loss_mask[1:]]
            report(i + 1, len(examples))
            yield float(losses.sum()), len(losses)
