"""What a caller may mean by a schema: JSON Schema, or a Python type that has one.

JSON Schema comes as a dict or as text; pydantic makes it of its models, of dataclasses, TypedDicts
and any other type, and reads the answer back into that type. What llguidance accepts but would
never end is refused here.

An object that names its properties and says nothing of others has no others here, though JSON
Schema lets it: what a model makes up besides is nothing that anybody reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gemma_multi.errors import OptionError

MAX_DEPTH = 64
_ALTERNATIVES = ("anyOf", "oneOf")


def read_schema(schema: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """(JSON Schema, what makes a value of a finished text). Raises OptionError."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"schema is a text that is no JSON: {error}") from None
        if not isinstance(schema, dict):
            raise OptionError(f"schema is {schema!r}, expected a JSON object")
    if isinstance(schema, Mapping):
        plain = _as_json(schema)
        _check(plain)
        return _closed(plain), json.loads
    return _of_a_type(schema)


def write_json(value: Any, fallback: Callable[[Any], Any] | None = None) -> str:
    """A value of any type as a model is to read or write it; `fallback` makes what JSON has no form
    for into something else. Raises ValueError where there is none."""
    from pydantic import TypeAdapter

    plain = TypeAdapter(Any).dump_python(value, mode="json", fallback=fallback)
    return json.dumps(plain, ensure_ascii=False)


def _of_a_type(kind: Any) -> tuple[dict[str, Any], Callable[[str], Any]]:
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError

    expected = (
        "expected a JSON Schema (dict or text), a pydantic model, a dataclass, a TypedDict or "
        "another type that pydantic knows"
    )
    if kind is None or isinstance(kind, bool | int | float | list | bytes):
        raise OptionError(f"schema is {kind!r}, {expected}")
    try:
        adapter = TypeAdapter(kind)
        schema = adapter.json_schema()
    except (PydanticUserError, NameError, TypeError) as error:  # of which a schema cannot be made
        reason = str(error).splitlines()[0]
        raise OptionError(f"schema is {kind!r}: {reason}; {expected}") from error
    _check(schema)
    return _closed(schema), adapter.validate_json


def _as_json(schema: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"schema holds what JSON does not: {error}") from None
    return plain


def _check(schema: dict[str, Any]) -> None:
    depth = _depth(schema)
    if depth > MAX_DEPTH:
        raise OptionError(f"schema is {depth} levels deep, expected at most {MAX_DEPTH}")
    if not _Ends(schema).ends():
        raise OptionError(
            "schema is recursive without end: no finite JSON fits it; make one of the properties "
            "on the way round optional"
        )


_IN_A_MAP = ("properties", "$defs", "definitions")  # by name
_IN_A_LIST = ("prefixItems", *_ALTERNATIVES)
_MIXED = ("$ref", *_ALTERNATIVES)  # which say more of the object they stand in


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where it says nothing of them. One that puts
    objects together from parts stays: each part would exclude the others."""
    return schema if _is_mixed(schema) else _close(schema)


def _is_mixed(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_mixed, value))
    if not isinstance(value, dict):
        return False
    if "allOf" in value or ("properties" in value and any(name in value for name in _MIXED)):
        return True
    return any(map(_is_mixed, value.values()))


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in _IN_A_MAP:
        if isinstance(schema.get(name), dict):
            closed[name] = {key: _close(inner) for key, inner in schema[name].items()}
    for name in _IN_A_LIST:
        if isinstance(schema.get(name), list):
            closed[name] = [_close(inner) for inner in schema[name]]
    for name in ("items", "additionalProperties"):
        if name in schema:
            closed[name] = _close(schema[name])
    if "properties" in schema and "patternProperties" not in schema:
        closed.setdefault("additionalProperties", False)
    return closed


def _depth(value: Any) -> int:
    """How deep objects and arrays are nested; JSON was read, so it is not too deep to walk."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            inner for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]  # fmt: skip
    return deepest


class _Ends:
    """Whether some finite JSON fits a schema, as far as its references decide that.

    A definition ends if what it cannot do without ends. One that comes round to itself does not,
    unless there is another way: so from none, more and more definitions are known to end, until
    nothing changes.
    """

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._known: set[str] = set()  # references whose targets end

    def ends(self) -> bool:
        references = set(_references(self._root))
        while True:
            more = {r for r in references - self._known if self._one(self._target(r))}
            if not more:
                return self._one(self._root)
            self._known |= more

    def _target(self, reference: str) -> Any:
        found: Any = self._root
        for part in reference.removeprefix("#").strip("/").split("/"):
            if part:
                name = part.replace("~1", "/").replace("~0", "~")
                found = found.get(name, True) if isinstance(found, dict) else True
        return found

    def _one(self, schema: Any) -> bool:
        if not isinstance(schema, dict):
            return True  # no reference in it
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference[:1] == "#" and reference not in self._known:
            return False
        for name in _ALTERNATIVES:
            ways = schema.get(name)
            if isinstance(ways, list) and ways and not any(map(self._one, ways)):
                return False
        parts = schema.get("allOf")
        if isinstance(parts, list) and not all(map(self._one, parts)):
            return False
        if schema.get("type") not in ("object", None) or not self._needed(schema):
            return self._items_end(schema)
        return all(map(self._one, self._needed(schema))) and self._items_end(schema)

    def _needed(self, schema: dict[str, Any]) -> list[Any]:
        properties, required = schema.get("properties"), schema.get("required")
        if not isinstance(properties, dict) or not isinstance(required, list):
            return []
        return [
            properties[name] for name in required if isinstance(name, str) and name in properties
        ]

    def _items_end(self, schema: dict[str, Any]) -> bool:
        least = schema.get("minItems", 0)
        if schema.get("type") != "array" or not isinstance(least, int) or least < 1:
            return True
        first = schema.get("prefixItems")
        first = first[:least] if isinstance(first, list) else []
        rest = [schema.get("items", True)] if len(first) < least else []
        return all(map(self._one, [*first, *rest]))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            yield reference
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)
