"""Recovery: what int4 costs a model, trained back from the model's own probabilities.

The published recipe for Gemma's QAT checkpoints: the int4 student learns to say what the
unquantised model says, word for word of the vocabulary, on any text of the kind it will see. No
labels are needed, and nothing new is learned.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.quantization import Recovery, quantize_checkpoint
from gemma_multi.training.finetune import choose_trainer, train
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.rows import Data

_DEFAULTS = {"learning_rate": 1e-5, "epochs": 1, "loss_on": "all"}


def recover(
    checkpoint: Checkpoint, data: Data, *, backend: str = "auto", progress: bool = True,
    **options: Any,
) -> tuple[Checkpoint, Recovery]:  # fmt: skip
    """(`checkpoint` on the int4 grid, trained to give its own unquantised probabilities on `data`;
    how far it was off before and after). Options are `finetune`'s."""
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"the checkpoint is {checkpoint.precision} already; recover needs the original, whose "
            "probabilities are the target"
        )
    for name in ("method", "qat", "validation"):
        if name in options:
            raise OptionError(f"{name} is not an option of recover")
    chosen = TrainingOptions.checked(
        {**_DEFAULTS, **options}, checkpoint.config.max_position_embeddings
    )
    with tempfile.TemporaryDirectory() as work:
        run = train(
            checkpoint, data, Path(work, "recovery"), choose_trainer(backend), 0.1, chosen,
            teacher=checkpoint, progress=progress,
        )  # fmt: skip
        before = next(r["validation_loss"] for r in run.history if "validation_loss" in r)
        if not run.best_step:  # nothing was won: the plain rounding is as good
            return quantize_checkpoint(checkpoint)[0], Recovery(before, before)
        found = run.checkpoint(best=True)
        tensors = {name: _loaded(tensor) for name, tensor in found.tensors.items()}
        how = "recovered from its own probabilities through the int4 grid"
        recovered = checkpoint.replace(
            tensors=tensors, provenance=checkpoint.provenance.modified(how)
        )
        assert run.best_loss is not None
        return recovered, Recovery(before, run.best_loss)


def _loaded(tensor: Any) -> Any:
    """A tensor in memory: the file it is mapped from is about to go."""
    import dataclasses

    import numpy as np

    if isinstance(tensor, np.ndarray):
        return np.array(tensor)
    arrays = {n: np.array(getattr(tensor, n)) for n in ("packed", "scales", "biases")}
    return dataclasses.replace(tensor, **arrays)
