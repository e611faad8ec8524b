"""Engines: one protocol (`base`), one module per framework, each imported on first use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines.base import Engine
from gemma_multi.errors import BackendError, GemmaError, OptionError

BACKENDS = ("mlx", "keras", "litert")
PRECISIONS = ("auto", "float32", "bfloat16", "int4")
INSTALL = {
    "mlx": "pip install 'gemma-multi[mlx]'",
    "keras": "pip install 'gemma-multi[keras]' (or 'gemma-multi[cuda]' for an NVIDIA GPU)",
}
_MODULES = {"mlx": "gemma_multi.engines.mlx", "keras": "gemma_multi.engines.keras"}


def create_engine(checkpoint: Checkpoint, backend: str = "auto", precision: str = "auto") -> Engine:
    """An engine that runs `checkpoint`. Raises BackendError or OptionError."""
    backend = choose_backend(backend)
    if precision == "float16":
        raise OptionError(
            "precision 'float16' is refused: Gemma 3's activations overflow it; use 'bfloat16'"
        )
    if precision not in PRECISIONS:
        raise OptionError(
            f"unknown precision {precision!r}, expected one of {', '.join(PRECISIONS)}"
        )
    if missing := missing_packages(backend):
        raise BackendError(
            f"backend {backend!r} needs {', '.join(missing)}, not installed: {INSTALL[backend]}"
        )
    try:
        return importlib.import_module(_MODULES[backend]).create(checkpoint, precision)
    except GemmaError:
        raise
    except ImportError as error:
        raise BackendError(
            f"backend {backend!r} is installed but cannot be imported ({error}): {INSTALL[backend]}"
        ) from error
    except Exception as error:  # drivers, platforms, memory: frameworks fail in many ways
        raise BackendError(
            f"backend {backend!r} could not start: {type(error).__name__}: {error}"
        ) from error


def choose_backend(backend: str = "auto") -> str:
    """The backend to use: as named, or for `auto` MLX on Apple silicon, else Keras."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend {backend!r}, expected auto, {', '.join(BACKENDS)}")
    if backend == "litert":
        raise BackendError("backend 'litert' is not part of this release; use 'mlx' or 'keras'")
    if backend != "auto":
        return backend
    on_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    order = ("mlx", "keras") if on_apple_silicon else ("keras", "mlx")
    for name in order:
        if not missing_packages(name):
            return name
    raise BackendError(f"no backend is installed: {INSTALL[order[0]]}")


def missing_packages(backend: str) -> list[str]:
    """What is not installed of the packages that a backend imports."""
    keras_runs_on = os.environ.get("KERAS_BACKEND") or "jax"
    needed = {
        "mlx": ("mlx.core", "mlx_lm"),
        "keras": ("keras", "keras_hub", keras_runs_on),
    }[backend]
    return [name for name in needed if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
