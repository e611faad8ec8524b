"""What a test needs of a machine, and may not find there."""

from __future__ import annotations

import importlib
import os
from typing import Any, NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skips the test, saying so; in CI, where everything is to be there, it fails."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def package(name: str, extra: str) -> Any:
    """A module of an optional package, which comes with an extra of this one."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"{name} is not installed: pip install 'gemma-multi[{extra}]'")
