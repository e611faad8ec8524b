"""What works on this machine: each backend is tried on the bundled model, not guessed at.

So are GPUs that a backend takes only when it is told to. A driver that is not up to it may end the
process, so that is tried in another one.

How fast the real model should be is said of processors alone, and as a bound: each token reads all
weights once, and memory gives so many bytes a second. What is measured of the bundled model, which
is seventy times smaller, says more about a backend's overhead.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib import metadata

from gemma_multi.engines import Backend, backends
from gemma_multi.errors import BackendError, GemmaError
from gemma_multi.loading import load

_ON_GPU = """
import sys, gemma_multi
from gemma_multi.errors import GemmaError
try:
    model = gemma_multi.load(
        "storyteller", backend=sys.argv[1], device="gpu", context_length=64, progress=False
    )
except GemmaError as error:
    sys.exit(str(error))
print(model.engine.gpu)
"""
_STORY = "Tell me a bedtime story.\nHero: Luna the owl\nTheme: courage\nLength: long"
_PATIENCE = 120  # seconds
_NONE = "none"
_TIMED = 33  # tokens


@dataclass(frozen=True)
class Diagnosis:
    """Whether one backend works here."""

    backend: str
    works: bool
    device: str = "-"
    gpu: str = ""  # the one it sees; "none", and why; "" where it does not work
    advice: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    tokens_per_second: float = 0.0  # of the bundled model, as `load` runs it


def diagnose(names: Collection[str] | None = None) -> list[Diagnosis]:
    """Every backend but the references, or those of `names`. Raises BackendError for an unknown
    one."""
    known = {one.name: one for one in backends().values() if not one.is_reference}
    for name in names or ():
        if name not in known:
            raise BackendError(f"unknown backend {name!r}, expected {', '.join(known)}")
    return [_diagnose(one) for one in known.values() if names is None or one.name in names]


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
        for _ in range(2):  # what is compiled is compiled in the first
            timed = model.generate(_STORY, max_tokens=_TIMED, seed=1)
    except GemmaError as error:
        return Diagnosis(backend.name, False, advice=str(error), versions=versions)
    except Exception as error:  # a broken installation can fail in any way
        advice = f"fails with {type(error).__name__}: {error}"
        return Diagnosis(backend.name, False, advice=advice, versions=versions)
    engine = model.engine
    gpu = engine.gpu
    if not gpu and engine.device == "cpu":
        gpu = _gpu_of(backend.name) if backend.takes_a_device else _NONE
    advice = backend.advice(engine)
    speed = round(timed.tokens_per_second, 1)
    return Diagnosis(backend.name, True, engine.device, gpu, advice, versions, speed)


def _gpu_of(backend: str) -> str:
    command = [sys.executable, "-c", _ON_GPU, backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"{_NONE} that answers within {_PATIENCE} seconds"
    if done.returncode == 0:
        return done.stdout.strip()
    if done.returncode < 0:
        return f"{_NONE}: its driver ended the process with signal {-done.returncode}"
    lines = done.stderr.strip().splitlines() or ["unknown error"]
    return f"{_NONE}: {lines[-1]}"
