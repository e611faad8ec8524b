"""Recovery: what int4 costs a model, trained back from the model's own probabilities.

The published recipe for Gemma's QAT checkpoints: the int4 student learns to give words the
probabilities that the unquantised model gives them (`vocabulary` says which), on any text of the
kind it will see. No labels are needed, and nothing new is learned. What is trained are the scales
and the norms of the int4 model that calibration has made; its codes stay (see
`training/weights.py`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.calibration import check_source, is_self
from gemma_multi.calibration.writing import write_texts
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.decoder import Decoder, Weights
from gemma_multi.errors import OptionError, TrainingStopped
from gemma_multi.machine import available_cores
from gemma_multi.progress import Progress, reporting
from gemma_multi.rows import Data
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.training.examples import checked_rows
from gemma_multi.training.finetune import check_run, choose_trainer, train
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.result import RUN_FILE
from gemma_multi.transforms import Recovery, original

WRITTEN, LENGTH = 128, 256  # texts that the model writes, where there are no rows, and their tokens
_FEWEST, _MOST = 8, 4000  # texts: some of them are held out, and all have noise of their own
_OWN_OPTIONS = ("method", "qat", "validation")
_DEFAULTS = {
    "epochs": 3, "loss_on": "all", "too_long": "cut", "schedule": "cosine", "warmup": 0.05,
    "gradient_checkpointing": False,
}  # fmt: skip


@dataclass(frozen=True)
class Recoverer:
    """A recovery whose options and rows are checked, before anything that takes time."""

    teacher: Checkpoint  # whose probabilities are the target
    data: str | Data
    work: Path  # where the run is kept, and goes on if it was stopped
    options: TrainingOptions
    backend: str
    devices: Any
    written: int | None = None  # texts, where the teacher writes them

    @classmethod
    def checked(
        cls, checkpoint: Checkpoint, data: str | Data, work: Path, *, backend: str = "auto",
        devices: Any = None, texts: int | None = None, **options: Any,
    ) -> Recoverer:  # fmt: skip
        """data: rows as `finetune` takes them, or "self" for text that `checkpoint` writes;
        texts: how many of these, 128 where it is not said.
        options: `finetune`'s but for its method, qat and validation.

        Raises OptionError, CheckpointError where it is int4 already, DataError for rows that are
        bad, TrainingError where another run is in the directory `work`."""
        check_source("recover", data)
        if texts is not None and not is_self(data):
            raise OptionError("texts is for recover='self', and there are rows")
        if texts is not None and not (isinstance(texts, int) and _FEWEST <= texts <= _MOST):
            raise OptionError(f"texts is {texts!r}, expected a whole number {_FEWEST} to {_MOST:,}")
        for name in _OWN_OPTIONS:
            if name in options:
                raise OptionError(f"{name} is not an option of recover")
        chosen = TrainingOptions.checked(
            {**_DEFAULTS, **options}, checkpoint.config.max_position_embeddings, "scales"
        )
        backend = choose_trainer(backend)
        begun = (work / RUN_FILE).exists()
        written = (texts or WRITTEN) if is_self(data) else None
        facts = {"backend": backend, "options": chosen.to_dict(), "texts": written}
        check_run(work, facts if begun else None)
        if not is_self(data):
            data = checked_rows(data)
        return cls(original(checkpoint), data, work, chosen, backend, devices, written)

    def recover(self, start: Checkpoint, progress: Progress = True) -> tuple[Checkpoint, Recovery]:
        """(the int4 model `start`, trained; how far it was off before and after)."""
        rows, work = self.data, self.work
        if self.written is not None:
            with reporting(progress, "writing") as report:
                rows = _written(self.teacher, self.written, report)
        try:
            run = train(
                start, rows, work, self.backend, 0.1, self.options, teacher=self.teacher,
                texts=self.written, devices=self.devices, resume=(work / RUN_FILE).exists(),
                progress=progress,
            )  # fmt: skip
        except TrainingStopped:
            raise TrainingStopped(
                f"stopped; what was reached is kept in {work}. Do the same again to go on"
            ) from None
        before = next(r["validation_loss"] for r in run.history if "validation_loss" in r)
        if not run.best_step:  # nothing was won
            return start, Recovery(before, before)
        found = run.checkpoint(best=True)
        how = "recovered from its own probabilities"
        assert run.best_loss is not None
        return start.with_tensors(found.tensors, how), Recovery(before, run.best_loss)


def _written(checkpoint: Checkpoint, count: int, report: Any) -> list[dict[str, Any]]:
    """Rows of text that the model writes itself: conversations where it has learnt them."""
    tokenizer, length = checkpoint.tokenizer, min(LENGTH, checkpoint.config.max_position_embeddings)
    decoder = Decoder(checkpoint.config, Weights(checkpoint))
    with ThreadPoolExecutor(available_cores()) as pool:
        texts = write_texts(decoder, tokenizer, count, length, pool, report)
    rows = [as_row(tokenizer, ids) for ids in texts]
    return [row for row in rows if "messages" in row or row["text"].strip()]


def as_row(tokenizer: Tokenizer, ids: np.ndarray) -> dict[str, Any]:
    """A written text as rows are given: its turns, the last one perhaps cut, or plain."""
    starts = np.flatnonzero(ids == tokenizer.start_of_turn_id)
    parts = [part[part != tokenizer.end_of_turn_id] for part in np.split(ids, starts)]
    turns = [tokenizer.decode(part[1:].tolist()).split("\n", 1) for part in parts[1:]]
    said = [{"role": role, "content": "".join(text).strip()} for role, *text in turns]
    while said and not said[-1]["content"]:
        said.pop()
    said = said[: len(said) // 2 * 2]  # they end with what the model says
    roles = [turn["role"] for turn in said]
    if said and roles == ["user", "model"] * (len(said) // 2) and all(t["content"] for t in said):
        return {"messages": said}
    return {"text": tokenizer.decode(ids[1:].tolist())}  # also where it made up a turn of its own
