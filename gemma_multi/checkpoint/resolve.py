"""From what a user writes to a Checkpoint: the bundled name, a directory, or a Hugging Face id."""

from __future__ import annotations

from pathlib import Path

from gemma_multi.checkpoint import hub
from gemma_multi.checkpoint.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError

BUNDLED = {"storyteller": Path(__file__).parent.parent / "models" / "storyteller"}


def resolve(
    model: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> Checkpoint:
    """Opens a model by name. A directory wins over a hub id of the same spelling."""
    if not isinstance(model, str | Path) or not str(model):
        raise CheckpointError(
            f"model is {model!r}, expected a directory, a Hugging Face id or 'storyteller'"
        )
    if str(model) in BUNDLED and not Path(model).is_dir():
        return Checkpoint.open(BUNDLED[str(model)], source=str(model))
    if Path(model).exists():
        return Checkpoint.open(model)
    if isinstance(model, Path) or not hub.is_repository_id(model):
        raise CheckpointError(
            f"{model}: no such directory, and not a Hugging Face id such as "
            "google/gemma-3-270m-it; the bundled model is 'storyteller'"
        )
    path, commit = hub.download(model, revision, local_files_only)
    return Checkpoint.open(path, source=model, revision=commit)
