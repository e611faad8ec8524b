"""What a run leaves: the trained model or adapter, the best one, the picture, and FineTune over it.

After QAT the weights go through the very function that training rounded them with, and are saved
as int4: what was validated is what ships.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from gemma_multi import formats
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import TrainingError
from gemma_multi.exporters import save
from gemma_multi.exporters.peft import save_adapter
from gemma_multi.formats.peft import read_adapter
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.training.curves import draw_curves
from gemma_multi.training.history import History, read_history, verdict
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.run import Run
from gemma_multi.training.state import remove_temporaries
from gemma_multi.training.weights import as_adapter, with_changed_scales
from gemma_multi.transforms import cast_to_stored, merge, quantize_checkpoint

RUN_FILE, CURVES_FILE = "run.json", "curves.png"
ROWS_DIRECTORY = ".rows"  # tokenised data, while a run goes on


@dataclass
class FineTune:
    """A finished run, all of it in the directory `output`."""

    output: Path
    base: Checkpoint
    backend: str
    options: TrainingOptions
    history: list[dict[str, Any]]  # as in history.jsonl
    best_step: int | None  # with the lowest validation loss; None: nothing was held out
    best_loss: float | None
    loss: float | None  # the last validation loss
    verdict: str  # what came out, in a sentence or two

    @cached_property
    def model(self) -> Model:
        """The model after the last step."""
        return load(self.checkpoint(), backend=self.backend)

    @cached_property
    def best(self) -> Model:
        """The model of the step with the lowest validation loss."""
        return load(self.checkpoint(best=True), backend=self.backend)

    def checkpoint(self, best: bool = False) -> Checkpoint:
        """What was trained, as it ships: with the adapter merged, on the grid after QAT."""
        if best and self.best_step == 0:  # nothing was better than what there was
            on_grid = self.options.qat and not self.base.is_quantized
            return quantize_checkpoint(self.base)[0] if on_grid else self.base
        path = self.path(best)
        if self.options.method != "lora":
            return formats.read(path)
        merged = merge(self.base, read_adapter(path, self.base.config))
        if self.options.qat and not self.base.is_quantized:
            return quantize_checkpoint(merged)[0]
        return cast_to_stored(merged, self.base)

    def path(self, best: bool = False) -> Path:
        """The directory of the model, or with LoRA of the adapter. (Where `best_step` is 0 the
        best one is the base, which has none here.)"""
        kept = self.output / f"best-{self.options.result}"
        return kept if best and kept.exists() else self.output / self.options.result

    def __str__(self) -> str:
        return f"{self.path()}\n{self.verdict}"


def write_results(run: Run, base: Checkpoint, output: Path) -> None:
    """The models or adapters, and the picture."""
    options, position = run.options, run.position
    best = position.best_step
    kept = {"": run.trainer.tensors()}
    if best is not None and 0 < best < run.steps:
        kept["best-"] = load_file(run.best_path(best))
    for prefix, tensors in kept.items():
        target = output / f"{prefix}{options.result}"
        shutil.rmtree(target, ignore_errors=True)  # of a process killed right here
        if options.method == "lora":
            save_adapter(as_adapter(tensors, options, base.provenance), target)
        else:
            save(_trained_checkpoint(base, tensors, options, run), target)
    title = f"{base.provenance.source}, {options.method}" + ", QAT int4" * options.qat
    if not draw_curves(run.history, output / CURVES_FILE, title):
        run.display.say(f"{CURVES_FILE} needs: pip install 'gemma-multi[train]'")


def _trained_checkpoint(
    base: Checkpoint, tensors: dict[str, np.ndarray], options: TrainingOptions, run: Run
) -> Checkpoint:
    rows = len(run.batches.examples)
    if options.method == "scales":
        how = f"scales and norms fine-tuned on {rows} rows"
        return base.with_tensors(with_changed_scales(base, tensors), how)
    how = f"fine-tuned on {rows} rows" + " through the int4 grid" * options.qat
    checkpoint = base.with_tensors(tensors, how)
    if options.qat:
        return quantize_checkpoint(checkpoint)[0]
    dtype = np.dtype(getattr(ml_dtypes, base.config.dtype, base.config.dtype))
    return checkpoint.with_tensors({n: t.astype(dtype) for n, t in tensors.items()})


def read_run(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{output / RUN_FILE}: cannot be read: {error}") from error


def read_result(output: Path, base: Checkpoint, backend: str, options: TrainingOptions) -> FineTune:
    """What a finished run left; the rest of it goes."""
    shutil.rmtree(output / ROWS_DIRECTORY, ignore_errors=True)
    for path in (*output.glob("best-*.safetensors"), output / "state.safetensors"):
        path.unlink(missing_ok=True)
    remove_temporaries(output)
    run = read_run(output)
    history = History(output / "history.jsonl")
    history.records = read_history(history.path)
    _, validated = history.curve("validation_loss")
    return FineTune(
        output, base, backend, options, history.records, run.get("best_step"),
        run.get("best_loss"), validated[-1] if validated else None, verdict(history),
    )  # fmt: skip
