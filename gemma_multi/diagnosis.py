"""What works on this machine: each backend is tried on the bundled model, not guessed at."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import metadata

from gemma_multi.engines import Backend, backends
from gemma_multi.errors import GemmaError
from gemma_multi.loading import load


@dataclass(frozen=True)
class Diagnosis:
    """Whether one backend works here."""

    backend: str
    works: bool
    device: str = "-"
    advice: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def diagnose() -> list[Diagnosis]:
    """Every backend but the references."""
    return [_diagnose(one) for one in backends().values() if not one.is_reference]


def _diagnose(backend: Backend) -> Diagnosis:
    versions = {}
    for package in backend.packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if missing := backend.missing():
        advice = f"{', '.join(missing)} missing: {backend.install}"
        return Diagnosis(backend.name, False, advice=advice, versions=versions)
    try:
        model = load("storyteller", backend=backend.name, progress=False)
        model.generate("Good night.", max_tokens=1, temperature=0)
    except GemmaError as error:
        return Diagnosis(backend.name, False, advice=str(error), versions=versions)
    except Exception as error:  # a broken installation can fail in any way
        advice = f"fails with {type(error).__name__}: {error}"
        return Diagnosis(backend.name, False, advice=advice, versions=versions)
    advice = backend.advice(model.engine)
    return Diagnosis(backend.name, True, model.engine.device, advice, versions)
