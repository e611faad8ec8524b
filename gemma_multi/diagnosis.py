"""What works on this machine: each backend is tried on the bundled model, not guessed at."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import metadata

from gemma_multi.engines import BACKENDS, INSTALL, missing_packages
from gemma_multi.errors import GemmaError

_PACKAGES = {
    "mlx": ("mlx", "mlx-lm"),
    "keras": ("keras", "keras-hub", "jax", "tensorflow"),
    "litert": ("ai-edge-litert", "litert-lm-builder"),
}


@dataclass(frozen=True)
class Diagnosis:
    """Whether one backend works here."""

    backend: str
    works: bool
    device: str = "-"
    advice: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def diagnose() -> list[Diagnosis]:
    return [_diagnose(backend) for backend in BACKENDS]


def _diagnose(backend: str) -> Diagnosis:
    from gemma_multi.loading import load

    versions = {}
    for package in _PACKAGES[backend]:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if missing := missing_packages(backend):
        advice = f"{', '.join(missing)} missing: {INSTALL[backend]}"
        return Diagnosis(backend, False, advice=advice, versions=versions)
    try:
        model = load("storyteller", backend=backend)
        model.generate("Good night.", max_tokens=1, temperature=0)
    except GemmaError as error:
        return Diagnosis(backend, False, advice=str(error), versions=versions)
    except Exception as error:  # a broken installation can fail in any way
        advice = f"fails with {type(error).__name__}: {error}"
        return Diagnosis(backend, False, advice=advice, versions=versions)
    advice = ""
    if backend == "mlx" and sys.platform != "darwin":
        advice = "for checking only; MLX is fast on Apple silicon"
    if backend == "keras" and model.engine.device == "cpu":
        advice = "on an NVIDIA GPU: pip install 'gemma-multi[cuda]'"
    return Diagnosis(backend, True, model.engine.device, advice, versions)
