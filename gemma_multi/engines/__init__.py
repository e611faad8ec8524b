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
PRECISIONS = ("auto", "float32", "bfloat16", "int4", "int8")
INSTALL = {
    "mlx": "pip install 'gemma-multi[mlx]'",
    "keras": "pip install 'gemma-multi[keras]' (or 'gemma-multi[cuda]' for an NVIDIA GPU)",
    "litert": "pip install 'gemma-multi[litert]'",
}


def create_engine(
    checkpoint: Checkpoint, backend: str = "auto", precision: str = "auto",
    context_length: int | None = None, threads: int | None = None,
) -> Engine:  # fmt: skip
    """An engine that runs `checkpoint`. Raises BackendError or OptionError.

    `context_length` is the most that sessions will ask for, `threads` the processor's cores to
    use; only LiteRT fixes them beforehand, and `threads` is refused elsewhere.
    """
    if backend == "auto":  # asking a file of 151 MB whether it is quantised takes time
        backend = choose_backend(backend, checkpoint.is_quantized)
    backend = choose_backend(backend)
    if threads is not None and backend != "litert":
        raise OptionError(f"threads is an option of backend 'litert', not of {backend!r}")
    if precision == "float16":
        raise OptionError(
            "precision 'float16' is refused: Gemma 3's activations overflow it; use 'bfloat16'"
        )
    if precision not in PRECISIONS:
        raise OptionError(
            f"unknown precision {precision!r}, expected one of {', '.join(PRECISIONS)}"
        )
    check_installed(backend)
    try:
        module = importlib.import_module(f"gemma_multi.engines.{backend}")
        if backend == "litert":
            return module.create(checkpoint, precision, context_length, threads)
        return module.create(checkpoint, precision)
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


def choose_backend(backend: str = "auto", quantized: bool = False) -> str:
    """The backend to use: as named, or for `auto` MLX on Apple silicon, Keras beside an NVIDIA
    GPU, and on other processors LiteRT for quantised weights, Keras for the rest."""
    if backend not in ("auto", *BACKENDS):
        raise BackendError(f"unknown backend {backend!r}, expected auto, {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if sys.platform == "darwin" and platform.machine() == "arm64":
        order = ("mlx", "litert", "keras")
    elif quantized and not _has_nvidia_gpu():
        order = ("litert", "keras", "mlx")
    else:
        order = ("keras", "litert", "mlx")
    for name in order:
        if not missing_packages(name):
            return name
    raise BackendError(f"no backend is installed: {INSTALL[order[0]]}")


def _has_nvidia_gpu() -> bool:
    """Without importing a framework, which takes seconds."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")  # Linux, and WSL


def missing_packages(backend: str) -> list[str]:
    """What is not installed of the packages that a backend imports."""
    keras_runs_on = os.environ.get("KERAS_BACKEND") or "jax"
    needed = {
        "mlx": ("mlx.core", "mlx_lm"),
        "keras": ("keras", "keras_hub", keras_runs_on),
        "litert": ("ai_edge_litert",),
    }[backend]
    return [name for name in needed if not _installed(name)]


def check_installed(backend: str) -> None:
    """Raises BackendError with what to install."""
    if missing := missing_packages(backend):
        raise BackendError(
            f"backend {backend!r} needs {', '.join(missing)}, not installed: {INSTALL[backend]}"
        )


def _installed(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
