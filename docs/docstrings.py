"""Docstrings and fields as the API reference shows them: an extension of Griffe, which reads the
source for mkdocstrings.

A docstring of this package describes a parameter by a paragraph that begins with its name and a
colon, several at once by `one, other:`; such a paragraph becomes an item of a list. What a field of
a dataclass means stands beside it, in a comment or in `option(default, meaning)`; the fields become
a list under the docstring of their class, together with properties whose name says it all.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

_DESCRIBED = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")
_BESIDE = re.compile(r" What (a|each) field means stands beside it[^.]*\.")
_COMMENT = re.compile(r"\s#\s(.*)$")


class Descriptions(griffe.Extension):
    """Makes lists of what docstrings and fields say."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            known = {parameter.name.lstrip("*") for parameter in func.parameters}
            func.docstring.value = as_list(func.docstring.value, known)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is None:
            return
        text = as_list(cls.docstring.value, set(cls.members))
        if "dataclass" in cls.labels:
            text = _BESIDE.sub("", text)
            text += "\n\n" + "\n".join(fields(cls))
        cls.docstring.value = text


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


def fields(cls: griffe.Class) -> Iterator[str]:
    """An item for each public field, and for each property that has no docstring of its own."""
    assert isinstance(cls.filepath, Path)
    source = cls.lines_collection[cls.filepath]
    for field in cls.attributes.values():
        if field.name.startswith("_") or field.docstring is not None or field.annotation is None:
            continue
        assert field.lineno is not None
        meaning = _said_in_option(field) or _said_beside(source, field.lineno - 1)
        told = f"- `{field.name}: {field.annotation}`"
        yield f"{told}: {meaning}" if meaning else told


def _said_in_option(field: griffe.Attribute) -> str:
    """The meaning in `option(default, meaning)`."""
    value = field.value
    if not isinstance(value, griffe.ExprCall) or str(value.function) != "option":
        return ""
    default, meaning = value.arguments
    if isinstance(meaning, griffe.Expr):  # computed, so not to be read from the source
        return ""
    if isinstance(default, griffe.ExprName):
        default = field.modules_collection[default.canonical_path].value
    said = ast.literal_eval(str(meaning))
    return said if str(default) == "None" else f"{said} Unless given: `{default}`."


def _said_beside(source: list[str], line: int) -> str:
    """The comment on a field's line, or else the lines of comment right above it."""
    if found := _COMMENT.search(source[line]):
        return found[1]
    first = line
    while source[first - 1].lstrip().startswith("# "):
        first -= 1
    return " ".join(text.strip().removeprefix("# ") for text in source[first:line])
