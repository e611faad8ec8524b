"""Recovery: what int4 costs a model, trained back from the model's own probabilities.

The published recipe for Gemma's QAT checkpoints: the int4 student learns to say what the
unquantised model says, word for word of the vocabulary, on any text of the kind it will see. No
labels are needed, and nothing new is learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import OptionError, TrainingStopped
from gemma_multi.progress import Progress
from gemma_multi.rows import Data
from gemma_multi.training.finetune import choose_trainer, train
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.result import RUN_FILE
from gemma_multi.transforms import Recovery, original, quantize_checkpoint

_DEFAULTS = {"learning_rate": 1e-5, "epochs": 1, "loss_on": "all"}


def recover(
    checkpoint: Checkpoint, data: Data, work: Path, *, backend: str = "auto",
    devices: Any = None, progress: Progress = True, **options: Any,
) -> tuple[Checkpoint, Recovery]:  # fmt: skip
    """(`checkpoint` on the int4 grid, trained to give its own unquantised probabilities on `data`;
    how far it was off before and after). Options are `finetune`'s but for its method, qat and
    validation. The run is kept in the directory `work`, and goes on from there if it was stopped.
    """
    checkpoint = original(checkpoint)  # whose probabilities are the target
    for name in ("method", "qat", "validation"):
        if name in options:
            raise OptionError(f"{name} is not an option of recover")
    chosen = TrainingOptions.checked(
        {**_DEFAULTS, **options}, checkpoint.config.max_position_embeddings
    )
    try:
        run = train(
            checkpoint, data, work, choose_trainer(backend), 0.1, chosen, teacher=checkpoint,
            devices=devices, resume=(work / RUN_FILE).exists(), progress=progress,
        )  # fmt: skip
    except TrainingStopped:
        raise TrainingStopped(
            f"stopped; what was reached is kept in {work}. Do the same again to go on"
        ) from None
    before = next(r["validation_loss"] for r in run.history if "validation_loss" in r)
    if not run.best_step:  # nothing was won: the plain rounding is as good
        return quantize_checkpoint(checkpoint)[0], Recovery(before, before)
    found = run.checkpoint(best=True)
    how = "recovered from its own probabilities through the int4 grid"
    recovered = checkpoint.with_tensors(found.tensors, how)
    assert run.best_loss is not None
    return recovered, Recovery(before, run.best_loss)
