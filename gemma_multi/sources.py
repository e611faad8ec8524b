"""Sources: what a user may write for a model, and the checkpoint behind it.

Every public verb takes the same: the bundled name, a path, a Hugging Face id, a Checkpoint, or a
loaded Model; with the same `revision` and `local_files_only`.
"""

from __future__ import annotations

from pathlib import Path

from gemma_multi import formats, hub
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import CheckpointError, OptionError
from gemma_multi.model import Model

Source = str | Path | Checkpoint | Model

BUNDLED = {"storyteller": Path(__file__).parent / "models" / "storyteller"}


def open_checkpoint(
    model: Source, *, revision: str | None = None, local_files_only: bool = False,
    progress: bool = True,
) -> Checkpoint:  # fmt: skip
    """Opens a model without running it.

    model: the bundled `"storyteller"`, a directory (Hugging Face's layout, mlx-lm's 4-bit layout
        or ours), a `.gguf` or `.sbs`, a `.tflite` or `.litertlm` that `export` wrote, a Hugging
        Face id such as `"google/gemma-3-270m-it"`, a Checkpoint, or a Model, of which this is what
        runs: with the active adapter merged. (`./storyteller` is a directory, `storyteller` the
        bundled model.)
    revision: a branch, tag or commit of a hub repository.
    local_files_only: never ask the hub, use its cache only.
    progress: show a bar on a terminal while files are fetched.

    Raises HubError, CheckpointError, ConfigError, TokenizerError or OptionError.
    """
    if isinstance(model, Checkpoint | Model):
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, but the model is loaded already and has no revisions"
            )
        return model.checkpoint if isinstance(model, Model) else model
    if not isinstance(model, str | Path) or not str(model):
        raise CheckpointError(
            f"model is {model!r}, expected a directory, a Hugging Face id, 'storyteller', a "
            "Checkpoint or a Model"
        )
    bundled = BUNDLED.get(model) if isinstance(model, str) else None
    local = bundled or (Path(model) if _exists(Path(model)) else None)
    if local is not None:
        if revision is not None:
            raise OptionError(
                f"revision is {revision!r}, but {model} is not on the hub and has no revisions"
            )
        return formats.read(local)
    suffixes = {one.suffix for one in formats.formats().values() if one.suffix}
    if Path(model).suffix.lower() in suffixes:
        raise CheckpointError(f"{model}: no such file")
    if isinstance(model, Path) or not hub.is_repository_id(model):
        raise CheckpointError(
            f"{model}: no such directory, and not a Hugging Face id such as "
            "google/gemma-3-270m-it; the bundled model is 'storyteller'"
        )
    found = hub.download(model, revision, local_files_only, bars=progress)
    checkpoint = formats.read(found.path)
    facts = checkpoint.provenance.from_hub(model, found.commit, found.license)
    return checkpoint.replace(provenance=facts)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a name too long, a directory that may not be entered
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL in the name
        raise CheckpointError(f"{str(path)!r} is not a path: {error}") from error
