"""The state of a run on disk: enough to go on as if nothing had happened.

One safetensors file holds what is trained and what the optimiser remembers, and in its metadata
where the run stands. It replaces the one before in a single rename, so that a killed process, or
a full disk, leaves the last whole one. Batches follow from the seed and need no state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gemma_multi.errors import TrainingError
from gemma_multi.files import renamed_when_whole
from gemma_multi.safetensors_file import write_safetensors

_TRAINED, _OPTIMIZER = "trained ", "optimizer "


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # behind it
    best_step: int | None = None
    best_loss: float | None = None  # of the validation
    validated: int | None = None  # the last step it was validated at


def save_state(
    path: Path,
    position: Position,
    trained: Mapping[str, np.ndarray],
    optimizer: Mapping[str, np.ndarray],
) -> None:
    """Raises TrainingError when it cannot be written; the state before it is still there."""
    tensors = {_TRAINED + name: array for name, array in trained.items()}
    tensors |= {_OPTIMIZER + name: array for name, array in optimizer.items()}
    try:
        write_tensors(path, tensors, {"position": json.dumps(asdict(position))})
    except OSError as error:
        kept = f"the state before it is kept in {path}" if path.exists() else "none was kept yet"
        raise TrainingError(
            f"{path}: the state of step {position.step} cannot be saved: "
            f"{error.strerror or error}; {kept}. Make room and go on with resume=True"
        ) from error


def read_state(path: Path) -> tuple[Position, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(position, trained, optimiser). Raises TrainingError where the file is none of ours."""
    trained: dict[str, np.ndarray] = {}
    optimizer: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            position = Position(**json.loads(file.metadata()["position"]))
            for key in file.keys():  # noqa: SIM118  it is no dict
                kept, name = (
                    (trained, key.removeprefix(_TRAINED))
                    if key.startswith(_TRAINED)
                    else (optimizer, key.removeprefix(_OPTIMIZER))
                )
                kept[name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: is not the state of a run: {error}") from error
    return position, trained, optimizer


def remove_temporaries(directory: Path) -> None:
    """What killed processes had half written: all that begins with a dot and a name of ours."""
    for name in ("state", "best-", "history", "run", "model", "adapter", "curves"):
        for path in directory.glob(f".{name}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_step(path: Path) -> int:
    """How many steps a state has behind it."""
    with safe_open(path, framework="numpy") as file:
        return int(json.loads(file.metadata()["position"])["step"])


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, whole and on the disk, or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(path) as temporary:
        # zero-dimensional and foreign-ordered arrays come out as they went in
        whole = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in tensors.items()}
        write_safetensors(whole, temporary, metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
