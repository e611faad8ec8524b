"""One API for the Gemma 3 270M family on MLX, Keras and LiteRT.

>>> import gemma_multi
>>> model = gemma_multi.load("storyteller")
>>> print(model.generate("Tell me a bedtime story.\\nHero: Pip the hedgehog").text)

Importing this package imports no framework; every public name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_multi.benchmarking import BenchReport, SoakReport, bench, soak
    from gemma_multi.chat import Chat
    from gemma_multi.checkpoint import Checkpoint
    from gemma_multi.comparison import ParityReport, parity
    from gemma_multi.config import ModelConfig
    from gemma_multi.converting import Conversion, convert
    from gemma_multi.errors import (
        BackendError,
        BatchError,
        BatchStopped,
        CheckpointError,
        ConfigError,
        ConstraintError,
        ContextError,
        DataError,
        GemmaError,
        HubError,
        OptionError,
        PlainRoundingWarning,
        TokenizerError,
        TrainingError,
        TrainingStopped,
        VerificationError,
    )
    from gemma_multi.evaluation import EvaluationReport, evaluate
    from gemma_multi.exporters import ExportReport
    from gemma_multi.exporting import export
    from gemma_multi.generation import GenerationResult, TextScore
    from gemma_multi.loading import load
    from gemma_multi.model import Model
    from gemma_multi.pushing import PushReport, push
    from gemma_multi.quantizing import quantize
    from gemma_multi.sampling import GenerationOptions
    from gemma_multi.shipping import ShipReport, ship
    from gemma_multi.sources import open_checkpoint
    from gemma_multi.streaming import TextStream
    from gemma_multi.tasks import BatchRow, Classification
    from gemma_multi.tokenizer import Tokenizer
    from gemma_multi.tools import Call, Tool
    from gemma_multi.training.finetune import finetune
    from gemma_multi.training.result import FineTune
    from gemma_multi.training.validation import ValidationLoss, validation_loss
    from gemma_multi.transforms import QuantizationReport
    from gemma_multi.trimming import trim

__version__ = "0.1.0"

_HOME = {
    "BackendError": "errors",
    "BatchError": "errors",
    "BatchStopped": "errors",
    "BatchRow": "tasks",
    "BenchReport": "benchmarking",
    "Call": "tools",
    "Chat": "chat",
    "Checkpoint": "checkpoint",
    "Classification": "tasks",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ConstraintError": "errors",
    "Conversion": "converting",
    "ContextError": "errors",
    "DataError": "errors",
    "EvaluationReport": "evaluation",
    "ExportReport": "exporters",
    "FineTune": "training.result",
    "GemmaError": "errors",
    "GenerationOptions": "sampling",
    "GenerationResult": "generation",
    "HubError": "errors",
    "Model": "model",
    "ModelConfig": "config",
    "OptionError": "errors",
    "PlainRoundingWarning": "errors",
    "ParityReport": "comparison",
    "PushReport": "pushing",
    "QuantizationReport": "transforms",
    "ShipReport": "shipping",
    "SoakReport": "benchmarking",
    "TextScore": "generation",
    "TextStream": "streaming",
    "Tokenizer": "tokenizer",
    "TokenizerError": "errors",
    "Tool": "tools",
    "TrainingError": "errors",
    "VerificationError": "errors",
    "TrainingStopped": "errors",
    "ValidationLoss": "training.validation",
    "bench": "benchmarking",
    "convert": "converting",
    "evaluate": "evaluation",
    "export": "exporting",
    "finetune": "training.finetune",
    "load": "loading",
    "open_checkpoint": "sources",
    "parity": "comparison",
    "push": "pushing",
    "quantize": "quantizing",
    "ship": "shipping",
    "soak": "benchmarking",
    "trim": "trimming",
    "validation_loss": "training.validation",
}
__all__ = [
    "BackendError",
    "BatchError",
    "BatchRow",
    "BatchStopped",
    "BenchReport",
    "Call",
    "Chat",
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "ConfigError",
    "ConstraintError",
    "ContextError",
    "Conversion",
    "DataError",
    "EvaluationReport",
    "ExportReport",
    "FineTune",
    "GemmaError",
    "GenerationOptions",
    "GenerationResult",
    "HubError",
    "Model",
    "ModelConfig",
    "OptionError",
    "ParityReport",
    "PlainRoundingWarning",
    "PushReport",
    "QuantizationReport",
    "ShipReport",
    "SoakReport",
    "TextScore",
    "TextStream",
    "Tokenizer",
    "TokenizerError",
    "Tool",
    "TrainingError",
    "TrainingStopped",
    "ValidationLoss",
    "VerificationError",
    "bench",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "load",
    "open_checkpoint",
    "parity",
    "push",
    "quantize",
    "ship",
    "soak",
    "trim",
    "validation_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gemma_multi' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gemma_multi.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
