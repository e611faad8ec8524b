"""What a format has to say of itself, to be found and read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError


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


def checked_generation(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The options a checkpoint brings along; its stop ids are checked here, the rest on use."""
    eos = data.get("eos_token_id", [])
    if not all(type(i) is int for i in (eos if isinstance(eos, list) else [eos])):
        raise CheckpointError(
            f"{where}: eos_token_id is {eos!r}, expected a token id or a list of them"
        )
    return data
