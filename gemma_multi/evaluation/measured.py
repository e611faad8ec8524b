"""What was measured: of which weights, on what, and on which rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gemma_multi import __version__
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import DataError
from gemma_multi.model import Model
from gemma_multi.rows import Data


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which weights were measured."""
    origin = checkpoint.provenance
    return {"source": origin.source, "revision": origin.revision,
            "weights_sha256": checkpoint.digest()}  # fmt: skip


def place_of(model: Model) -> dict[str, Any]:
    """What they ran on."""
    facts = model.describe()
    names = ("backend", "device", "weights", "activations", "context_length", "adapter")
    return {
        **{name: facts[name] for name in names if name in facts},
        "package": f"gemma_multi {__version__}",
    }


def with_digest(data: Data) -> tuple[Data, str]:
    """Data that can be read, and its SHA-256: of a file's bytes, else of the rows as JSON."""
    if isinstance(data, str | Path):
        path = Path(data)
        try:
            with path.open("rb") as file:
                return data, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if isinstance(data, dict) or not hasattr(data, "__iter__"):
        raise DataError(f"data is {type(data).__name__}, expected a file or rows")
    rows = list(data)
    plain = json.dumps(rows, sort_keys=True, default=str, ensure_ascii=False)
    return rows, hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()
