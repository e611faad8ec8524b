"""What a format has to say of itself, to be found and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gemma_multi.checkpoint import Checkpoint


@dataclass(frozen=True)
class Format:
    """One way a model lies on disk. `gemma_multi.formats.<name>` reads it,
    `gemma_multi.exporters.<name>` writes it."""

    name: str
    what: str  # for people: "a .tflite file"
    suffix: str  # of a file, with its dot; "" for a directory
    looks_like: Callable[[Path], bool]  # by its content; raises nothing
    read: Callable[[Path], Checkpoint]  # raises CheckpointError, ConfigError, TokenizerError

    is_model: bool = True  # False: what is no model by itself, and says so when it is read

    @property
    def is_directory(self) -> bool:
        return not self.suffix
