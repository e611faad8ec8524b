"""What a framework has to do for training; the run above it (`run.py`) is the same for both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import ModelConfig
from gemma_multi.training.batches import Batch
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.vocabulary import Vocabulary
from gemma_multi.training.weights import Int4

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, on both engines
_MOST_KEPT = 1_000_000_000  # bytes of activations


@dataclass
class Job:
    """What is trained, how, and on what. The tensors are taken out of it as they are placed in the
    framework's memory, so that they are not held twice."""

    config: ModelConfig
    trained: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray | Int4]
    options: TrainingOptions
    dtype: str  # of the activations
    teacher: Checkpoint | None = None  # whose probabilities are the target
    devices: Any = None
    # in a step, over which a teacher is followed; all words if None, or the embedding is trained
    vocabulary: Vocabulary | None = None

    @property
    def scale(self) -> float:
        """Of the LoRA adapter."""
        return self.options.alpha / self.options.rank

    def computes_twice(self, tokens: int) -> bool:
        """Whether a micro-batch of so many, padding too, goes through each layer once more for its
        gradient, rather than that the memory is held for what the layers gave."""
        asked = self.options.gradient_checkpointing
        return tokens * _kept_bytes(self.config) > _MOST_KEPT if asked is None else asked

    def teacher_weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """One by one, `f32`; nothing without a teacher."""
        if self.teacher is not None:
            for name in self.config.tensor_shapes():
                yield name, self.teacher.weight(name).astype(np.float32)


@dataclass(frozen=True)
class StepResult:
    """Of one step, in the framework's own scalars, which may still be on their way."""

    loss: Any  # summed over the tokens that have one
    gradient_norm: Any  # of the mean loss, before clipping


class Trainer(ABC):
    """Trained tensors and an optimiser in a framework's memory."""

    device: str
    rank = 0  # of this process, where several train together

    def any_of(self, flag: bool) -> bool:
        """Whether a flag is set in any of the processes."""
        return flag

    @abstractmethod
    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        """One update of AdamW from the gradients of a batch's micro-batches."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> float:
        """The loss of a batch, summed over its tokens."""

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """What is trained, by name."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, np.ndarray]:
        """All that the optimiser remembers, by name."""

    @abstractmethod
    def restore(
        self, tensors: Mapping[str, np.ndarray], optimizer: Mapping[str, np.ndarray]
    ) -> None:
        """Resumes from what `tensors` and `optimizer_state` once gave."""


def _kept_bytes(config: ModelConfig) -> int:
    """Of what the gradient needs of one token, in float32 (seen on Keras: two thirds of it)."""
    heads = config.num_attention_heads + config.num_key_value_heads
    of_a_layer = 8 * config.hidden_size + 4 * (config.intermediate_size + heads * config.head_dim)
    return 4 * config.num_hidden_layers * of_a_layer
