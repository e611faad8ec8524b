"""Places: a backend, a precision and a device, of which each is measured on its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gemma_multi.benchmarking.traffic import weight_bytes
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines import backends as all_backends
from gemma_multi.engines import choose_backend
from gemma_multi.errors import BackendError, OptionError
from gemma_multi.loading import load
from gemma_multi.machine import available_memory
from gemma_multi.model import Model

AUTO = "auto"
DEVICES = (AUTO, "cpu", "gpu")


@dataclass(frozen=True)
class BenchPlace:
    """Where a model runs, as `load` is told."""

    backend: str
    precision: str = AUTO
    device: str = AUTO

    def __str__(self) -> str:
        told = (self.backend, self.precision, self.device)
        return " ".join(one for one in told if one != AUTO) or AUTO

    def of(self, checkpoint: Checkpoint) -> BenchPlace:
        """With the backend that `load` would choose. Raises BackendError."""
        return replace(self, backend=choose_backend(self.backend, checkpoint, self.precision).name)

    def job(self, own: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
        """What `loaded` is told; of backends' `own` options those that this one has."""
        known = {field.name for field in fields(all_backends()[self.backend].options)}
        own = {"device": self.device, **own} if self.device != AUTO else own
        return {
            "backend": self.backend, "precision": self.precision, **source,
            **{name: value for name, value in own.items() if name in known},
        }  # fmt: skip


def loaded(job: Mapping[str, Any]) -> Model:
    """The model of a job's `load`, on its `device`, in a process that has loaded none before.
    Raises BackendError where the backend is on another device."""
    device = job["device"]
    if device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"}  # of JAX; TensorFlow
        if job["load"]["backend"] == "mlx":
            import mlx.core as mx

            mx.set_default_device(mx.cpu)
    model = load(**job["load"], progress=False)
    if device not in (AUTO, model.engine.device):
        raise BackendError(f"{model.backend} runs on the {model.engine.device} here")
    return model


def all_places(
    backends: Sequence[str] | None, precisions: Sequence[str], devices: Sequence[str]
) -> list[BenchPlace]:
    """Each of one with each of the others, none twice."""
    names = backends
    if names is None:
        names = [one.name for one in all_backends().values() if not one.is_reference]
    lists = {"backends": names, "precisions": precisions, "devices": devices}
    for what, given in lists.items():
        if isinstance(given, str) or not given:
            raise OptionError(f"{what} is {given!r}, expected a list of at least one name")
    found = (BenchPlace(b, p, d) for b in names for p in precisions for d in devices)
    return list(dict.fromkeys(found))


def check_places(asked: Sequence[BenchPlace], own: Mapping[str, Any]) -> None:
    """Raises BackendError or OptionError for a name that is none, and for an option that none of
    the backends has. What is known and cannot run here is found out by running it."""
    known = all_backends()
    precisions = dict.fromkeys(p for one in known.values() for p in one.precisions)
    options: set[str] = set()
    for place in asked:
        if place.backend not in (AUTO, *known):
            raise BackendError(
                f"unknown backend {place.backend!r}, expected {', '.join((AUTO, *known))}"
            )
        if place.precision not in (AUTO, *precisions):
            raise OptionError(
                f"unknown precision {place.precision!r}, expected {', '.join((AUTO, *precisions))}"
            )
        if place.device not in DEVICES:
            raise OptionError(f"unknown device {place.device!r}, expected {', '.join(DEVICES)}")
        options |= {f.name for one in known.values() if place.backend in (AUTO, one.name)
                    for f in fields(one.options)}  # fmt: skip
    for name in own:
        if name not in options - {"device"}:
            raise OptionError(f"none of the backends takes an option {name!r}")


def check_memory(place: BenchPlace, checkpoint: Checkpoint) -> None:
    """Raises BackendError where less is free than the weights alone take."""
    precision, free = place.precision, available_memory()
    needed = checkpoint.nbytes if precision == AUTO else weight_bytes(checkpoint.config, precision)
    if free is not None and needed > free:
        raise BackendError(
            f"the weights alone take {needed / 1e6:,.0f} MB of memory, and {free / 1e6:,.0f} MB "
            "are free"
        )
