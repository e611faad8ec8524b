"""Backend: all that the rest of the package knows of a framework, in one record."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines.base import Engine
from gemma_multi.errors import BackendError
from gemma_multi.progress import Report, silent


@dataclass(frozen=True)
class NoOptions:
    """Of a backend that has none of its own."""


@dataclass(frozen=True)
class Request:
    """What an engine is asked to be."""

    precision: str = "auto"
    context_length: int | None = None  # the most that sessions will ask for
    options: Any = NoOptions()  # the backend's own
    progress: Report = silent


@dataclass(frozen=True)
class Backend:
    """A framework that runs models. `gemma_multi.engines.<name>` has one, as `BACKEND`."""

    name: str
    title: str  # for people
    order: int  # its place in lists
    create: Callable[[Checkpoint, Request], Engine]
    modules: Callable[[], tuple[str, ...]]  # what is imported; asked when it is needed
    packages: tuple[str, ...]  # as pip calls them, for `doctor`
    install: str  # the command
    precisions: tuple[str, ...]  # beside "auto"
    # how well it suits this machine, for `auto`: the best of those installed is taken; by whether
    # the weights are quantised; 0: never
    suits: Callable[[bool], int]
    runs: tuple[str, ...] = ()  # formats whose files it runs as they are, and so takes first
    options: type = NoOptions
    trains: bool = False  # whether `gemma_multi.training.<name>_trainer` is there
    advice: Callable[[Engine], str] = lambda engine: ""  # for `doctor`

    @property
    def is_reference(self) -> bool:
        """Somebody else's whole stack, to be compared with; `auto` never takes it."""
        return self.suits(True) == self.suits(False) == 0

    @property
    def takes_a_device(self) -> bool:
        """Whether it runs on a GPU only when it is told to."""
        return any(option.name == "device" for option in fields(self.options))

    def missing(self) -> list[str]:
        """What is not installed of the modules it imports."""
        return [name for name in self.modules() if not is_installed(name)]

    def check_installed(self) -> None:
        """Raises BackendError with what to install."""
        if missing := self.missing():
            raise BackendError(
                f"backend {self.name!r} needs {', '.join(missing)}, not installed: {self.install}"
            )


def is_installed(module: str) -> bool:
    """Without importing it."""
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def on_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def has_nvidia_gpu() -> bool:
    """Without importing a framework, which takes seconds."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")  # Linux, and WSL
