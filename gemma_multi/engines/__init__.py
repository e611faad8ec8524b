"""Engines: one protocol (`base`), one module a backend, each imported on first use.

A backend is a module here with a record `BACKEND` (see `backend`); a new one is that one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines.backend import Backend, Request
from gemma_multi.engines.base import TIES, Engine, Session
from gemma_multi.engines.wants import ALL, HIDDEN, LAST, NOTHING, Chosen, Rows, Want, Wanted
from gemma_multi.errors import BackendError, GemmaError, OptionError
from gemma_multi.options import checked
from gemma_multi.progress import Report, silent
from gemma_multi.registry import find_record, find_records

__all__ = [
    "ALL",
    "HIDDEN",
    "LAST",
    "NOTHING",
    "TIES",
    "Backend",
    "Chosen",
    "Engine",
    "Request",
    "Rows",
    "Session",
    "Want",
    "Wanted",
    "backends",
    "choose_backend",
    "create_engine",
]

# how frameworks fail: drivers, platforms, memory. Anything else is a bug, and stays a traceback
_FAILURES = (RuntimeError, MemoryError, OSError, ImportError)
_FRAMEWORKS = ("jaxlib", "jax", "tensorflow", "torch", "mlx", "ai_edge_litert")


@cache
def backends() -> dict[str, Backend]:
    """Every backend by its name; the modules import no framework until an engine is made."""
    found = sorted(find_records(__name__, "BACKEND", Backend), key=lambda one: one.order)
    return {record.name: record for record in found}


def create_engine(
    checkpoint: Checkpoint, backend: str = "auto", precision: str = "auto",
    context_length: int | None = None, options: Mapping[str, Any] | None = None,
    progress: Report = silent,
) -> Engine:  # fmt: skip
    """An engine that runs `checkpoint`.

    `context_length` is the most that sessions will ask for, which only LiteRT fixes beforehand;
    `options` are the backend's own. Raises BackendError, CheckpointError or OptionError.
    """
    chosen = choose_backend(backend, checkpoint, precision)
    settings: Any = checked(chosen.options, options or {}, f"backend {chosen.name!r}")
    check_precision(chosen, precision)
    chosen.check_installed()
    try:
        request = Request(precision, context_length, settings, progress)
        return chosen.create(checkpoint, request)
    except GemmaError:
        raise
    except ImportError as error:
        raise BackendError(
            f"backend {chosen.name!r} is installed but cannot be imported ({error}): "
            f"{chosen.install}"
        ) from error
    except Exception as error:
        if not _is_frameworks(error):
            raise
        raise BackendError(
            f"backend {chosen.name!r} could not start: {type(error).__name__}: {error}"
        ) from error


def check_precision(backend: Backend, precision: str) -> None:
    """Raises OptionError for one that the backend does not compute."""
    if precision in ("auto", *backend.precisions):
        return
    known = {p: None for one in backends().values() for p in one.precisions}
    if precision not in known:
        raise OptionError(
            f"unknown precision {precision!r}, expected one of auto, {', '.join(known)}"
        )
    raise OptionError(
        f"backend {backend.name!r} computes in {', '.join(backend.precisions)}, not in {precision}"
    )


def choose_backend(
    name: str = "auto", checkpoint: Checkpoint | None = None, precision: str = "auto"
) -> Backend:
    """The backend as named; for `auto`, of those with the precision, the one that runs the
    checkpoint's own file as it is, else the installed one that suits this machine best: MLX on
    Apple silicon, Keras beside an NVIDIA GPU, and on other processors LiteRT for quantised weights,
    Keras for the rest."""
    if name != "auto":
        named = find_record(__name__, name, "BACKEND", Backend)  # the others are not looked at
        if named is None:
            known_names = ", ".join(["auto", *backends()])
            raise BackendError(f"unknown backend {name!r}, expected {known_names}")
        return named
    known = list(backends().values())
    # where none has it, the precision is what will be named
    known = [one for one in known if precision in ("auto", *one.precisions)] or known
    quantized = False
    if checkpoint is not None:
        for one in known:
            if checkpoint.format in one.runs:
                return one
        quantized = checkpoint.is_quantized
    ranked = sorted(known, key=lambda one: -one.suits(quantized))
    usable = [one for one in ranked if one.suits(quantized)]
    for one in usable:
        if not one.missing():
            return one
    raise BackendError(f"no backend is installed: {usable[0].install}")


def _is_frameworks(error: Exception) -> bool:
    if isinstance(error, NotImplementedError | RecursionError):
        return False
    return isinstance(error, _FAILURES) or type(error).__module__.split(".")[0] in _FRAMEWORKS
