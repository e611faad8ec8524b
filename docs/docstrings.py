"""Docstrings as the API reference shows them, for mkdocstrings.

A docstring of this package describes a parameter by a paragraph that begins with its name and a
colon, several at once by `one, other:`. Here such a paragraph becomes an item of a list. No text is
changed otherwise.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_DESCRIBED = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")


class Descriptions(griffe.Extension):
    """Makes lists of what docstrings say of parameters and attributes."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, {parameter.name.lstrip("*") for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        _rewrite(cls, set(cls.members))


def _rewrite(described: griffe.Object, known: set[str]) -> None:
    if described.docstring is not None:
        described.docstring.value = as_list(described.docstring.value, known)


def as_list(text: str, known: set[str]) -> str:
    """The text, with each paragraph that describes what is `known` as an item of a list."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _DESCRIBED.fullmatch(line)
        if found and set(found["names"].split(", ")) <= known:
            names = ", ".join(f"`{name}`" for name in found["names"].split(", "))
            lines += ["", f"- {names}: {found['text']}"]
            inside = True
            continue
        if inside and line and not line.startswith(" "):  # what follows the list
            lines.append("")
            inside = False
        lines.append(line)
    return "\n".join(lines)
