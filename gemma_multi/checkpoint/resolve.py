"""From what a user writes to a Checkpoint: the bundled name, a directory, or a Hugging Face id."""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import hub
from gemma_multi.checkpoint.checkpoint import Checkpoint
from gemma_multi.checkpoint.litert_file import SUFFIXES
from gemma_multi.errors import CheckpointError, OptionError

BUNDLED = {"storyteller": Path(__file__).parent.parent / "models" / "storyteller"}


def resolve(
    model: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Checkpoint:
    """Opens a model by name. `./storyteller` is a directory, `storyteller` the bundled model."""
    if not isinstance(model, str | Path) or not str(model):
        raise CheckpointError(
            f"model is {model!r}, expected a directory, a Hugging Face id or 'storyteller'"
        )
    bundled = BUNDLED.get(model) if isinstance(model, str) else None
    local = bundled or (Path(model) if _exists(Path(model)) else None)
    if local is not None:
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, but {model} is not on the hub and has no revisions"
            )
        return Checkpoint.open(local)
    if Path(model).suffix.lower() in SUFFIXES:
        raise CheckpointError(f"{model}: no such file")
    if isinstance(model, Path) or not hub.is_repository_id(model):
        raise CheckpointError(
            f"{model}: no such directory, and not a Hugging Face id such as "
            "google/gemma-3-270m-it; the bundled model is 'storyteller'"
        )
    path, commit = hub.download(model, revision, local_files_only)
    return Checkpoint.open(path, source=model, revision=commit)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a directory that may not be entered
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{str(path)!r} is not a path: {error}") from error
