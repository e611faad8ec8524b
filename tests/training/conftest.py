"""Both training engines, and data small enough for them to learn in a second."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_checkpoint, tiny_config

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import ALL, Engine
from gemma_multi.training.batches import Batch
from gemma_multi.training.finetune import trainer_module
from gemma_multi.training.history import read_history
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.trainer import Job, Trainer
from gemma_multi.training.vocabulary import Vocabulary
from gemma_multi.training.weights import frozen_weights, initial_tensors

TRAINERS = ("keras", "mlx")


@pytest.fixture(params=TRAINERS)
def trainer_backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make_trainer(
    backend: str, checkpoint: Checkpoint | None = None, *, devices: Any = None,
    teacher: Checkpoint | None = None, vocabulary: Vocabulary | None = None, **options: Any,
) -> Trainer:  # fmt: skip
    """A trainer of a tiny model, without the grid unless asked for."""
    config = tiny_config()
    checkpoint = checkpoint or random_checkpoint(config)
    chosen = TrainingOptions.checked({"qat": False, **options}, 256)
    dtype = "float32" if chosen.dtype == "auto" else chosen.dtype
    job = Job(checkpoint.config, initial_tensors(checkpoint, chosen),
              frozen_weights(checkpoint, chosen), chosen, dtype, teacher, devices,
              vocabulary)  # fmt: skip
    made: Trainer = trainer_module(backend).create(job)
    return made


def make_batch(ids: np.ndarray, labels: np.ndarray, segments: np.ndarray | None = None) -> Batch:
    segments = np.ones_like(ids) if segments is None else segments
    return Batch(ids[None], labels[None], segments[None], tuple(range(len(ids))))


def all_logits(engine: Engine, ids: np.ndarray) -> np.ndarray:
    """`i32[B, T]` -> `f32[B, T, V]`, a session a row."""
    return np.stack([engine.session().read(row, ALL) for row in ids])


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(r["step"] >= step and "loss" in r for r in read_history(output / "history.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {step}: {process.communicate()[1][-2000:]}")


ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."}
    for a in range(6) for b in range(5)
]  # fmt: skip
