"""Records in modules: how formats, exporters and backends are found without being listed.

A package's modules may each have a record under an agreed name; adding one is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

T = TypeVar("T")


def find_records(package: str, attribute: str, kind: type[T]) -> list[T]:
    """The records of a package's modules, in the order of the modules' names. Imports them all."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        record = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if isinstance(record, kind):
            found.append(record)
    return found
