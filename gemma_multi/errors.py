"""The errors this package raises on purpose.

Each message says what was received, what was expected and what to do, so that the command line
can print it as it is. Anything that is not a `GemmaError` is a bug in this package.
"""

from __future__ import annotations

from typing import Any


class GemmaError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(GemmaError):
    """A `config.json` that does not describe a Gemma 3 text model."""


class CheckpointError(GemmaError):
    """Weights or their files are missing, malformed or of another model."""


class VerificationError(GemmaError):
    """An exported file from which the program that it is for computes something else."""


class TokenizerError(GemmaError):
    """A tokenizer that is missing, malformed or not a Gemma tokenizer."""


class HubError(GemmaError):
    """The hub did not give or take a model: offline, not found, login or licence needed."""


class BackendError(GemmaError):
    """A backend that is unknown, not installed, or cannot do what was asked."""


class OptionError(GemmaError, ValueError):
    """An option or an input outside what is allowed."""


class ContextError(OptionError):
    """More tokens than the context holds."""


class ConstraintError(GemmaError):
    """An answer that does not fit what was asked of it: cut off before it was whole, or not taken
    by the type it should become. `result` is as far as it came."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class DataError(GemmaError):
    """Rows that cannot be used as they are; the file and the line are named."""


class TrainingError(GemmaError):
    """A training run that cannot start, go on, or be resumed."""


class TrainingStopped(TrainingError):
    """A run that was interrupted on purpose; its state is saved."""


class BatchError(GemmaError):
    """A batch that cannot begin or go on; what is done of it is kept."""


class BatchStopped(BatchError):
    """A batch that was interrupted on purpose; what is done of it is kept."""


class PlainRoundingWarning(UserWarning):
    """int4 was made by rounding alone, which loses more than `quantize` would."""
