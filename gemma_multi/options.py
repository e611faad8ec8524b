"""Options as data: dataclasses whose fields say what they mean, once.

What a format, a backend, generation or training can be told is a dataclass each. Its fields make
the keyword arguments in Python and the options on the command line, so that adding one is a line
in one file. What a field means stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from gemma_multi.errors import OptionError

T = TypeVar("T")


def option(default: Any, meaning: str) -> Any:
    """A field of an options dataclass; `meaning` is what the command line's help says."""
    return field(default=default, metadata={"help": meaning})


def refuse_unknown(
    kind: type | tuple[type, ...], given: Mapping[str, Any], owner: str = ""
) -> None:
    """Raises OptionError naming the first of `given` that `kind`, or none of several, has a field
    for."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    known = sorted(field.name for one in kinds for field in fields(one))
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    expected = f"expected one of {', '.join(known)}" if known else "it takes none"
    if owner:
        raise OptionError(f"{owner} takes no option {unknown[0]!r}; {expected}")
    raise OptionError(f"unknown option {unknown[0]!r}, {expected}")


def checked(kind: type[T], given: Mapping[str, Any], owner: str = "") -> T:
    """`kind(**given)`. Raises OptionError for an option that `owner` (a format, a backend) does
    not have; the dataclass itself checks the values."""
    refuse_unknown(kind, given, owner)
    return kind(**given)
