"""Records in modules: how formats, exporters and backends are found without being listed.

A package's modules may each have a record under an agreed name; adding one is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def find_record(package: str, name: str, attribute: str, kind: type[T]) -> T | None:
    """The record of the module of this name, without importing the others."""
    if name not in {module.name for module in pkgutil.iter_modules(_path(package))}:
        return None
    record = getattr(importlib.import_module(f"{package}.{name}"), attribute, None)
    return record if isinstance(record, kind) else None


def find_records(package: str, attribute: str, kind: type[T]) -> list[T]:
    """The records of a package's modules, in the order of the modules' names. Imports them all."""
    names = [module.name for module in pkgutil.iter_modules(_path(package))]
    records = (find_record(package, name, attribute, kind) for name in names)
    return [record for record in records if record is not None]


def _path(package: str) -> Iterable[str]:
    return importlib.import_module(package).__path__
