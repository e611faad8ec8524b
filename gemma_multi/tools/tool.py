"""Tool: a function that a model may call. Call: that it does.

A tool comes from a Python function (its signature, its docstring), from a pydantic model or from
the JSON that servers take (`{"type": "function", "function": {...}}`, or the inner part).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_multi.constraints.schema import read_schema
from gemma_multi.errors import OptionError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_ARGUMENT = re.compile(r"\s*(\w+)(?:\s*\([^)]*\))?\s*:\s*(.+)")
_DEFINITIONS = ("$defs", "definitions")
_EXPECTED = "expected a function, a pydantic model or {'name', 'description', 'parameters'}"


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str
    parameters: dict[str, Any]  # JSON Schema of an object, without references
    function: Callable[..., Any] | None = None

    def run(self, arguments: Mapping[str, Any]) -> Any:
        """Calls the Python function, with arguments of its own types."""
        from pydantic import validate_call

        if self.function is None:
            raise OptionError(f"tool {self.name!r} has no function to run")
        return validate_call(self.function)(**arguments)


@dataclass(frozen=True)
class Call:
    """A call that a model asks for."""

    name: str
    arguments: dict[str, Any]


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """Raises OptionError for what is no tool, and for two of one name."""
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise OptionError(f"tools is {tools!r}, expected a list")
    if not tools:
        raise OptionError("tools is empty, expected at least one")
    found: dict[str, Tool] = {}
    for one in tools:
        tool = one if isinstance(one, Tool) else _read(one)
        if tool.name in found:
            raise OptionError(f"two tools are called {tool.name!r}")
        found[tool.name] = tool
    return tuple(found.values())


def _read(given: Any) -> Tool:
    if isinstance(given, Mapping):
        return _of_json(given)
    if isinstance(given, type):
        schema, _ = read_schema(given)
        said = given.__dict__.get("__doc__") or ""  # its own, and none that dataclasses make
        said = "" if said.startswith(f"{given.__name__}(") else inspect.cleandoc(said)
        return _tool(given.__name__, said, schema)
    if callable(given):
        return _of_function(given)
    raise OptionError(f"tools hold {given!r}, {_EXPECTED}")


def _of_json(given: Mapping[str, Any]) -> Tool:
    inner = given.get("function", given) if given.get("type") == "function" else given
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise OptionError(f"tools hold {dict(given)!r}, which has no name; {_EXPECTED}")
    known = {"name", "description", "parameters", "strict"}
    unknown = sorted(map(str, set(inner) - known))
    if unknown:
        raise OptionError(f"tool {inner['name']!r} has the unknown key {unknown[0]!r}; {_EXPECTED}")
    schema, _ = read_schema(inner.get("parameters") or {"type": "object", "properties": {}})
    return _tool(inner["name"], inner.get("description") or "", schema)


def _of_function(function: Callable[..., Any]) -> Tool:
    name = getattr(function, "__name__", "")
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise OptionError(f"tool {name!r} says nothing of its parameters: {error}") from error
    for parameter in signature.parameters.values():
        if parameter.annotation is inspect.Parameter.empty:
            raise OptionError(f"tool {name!r}: its parameter {parameter.name!r} has no type")
    schema, _ = read_schema(function)
    description, arguments = _read_docstring(inspect.getdoc(function) or "")
    for key, meaning in arguments.items():
        if key in schema.get("properties", {}):
            schema["properties"][key].setdefault("description", meaning)
    return _tool(name, description, schema, function)


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what comes before `Args:`, what it says of each argument)."""
    before, _, after = text.partition("Args:")
    listed, _, _ = after.partition("Returns:")
    found = (_ARGUMENT.fullmatch(line) for line in listed.splitlines())
    return " ".join(before.split()), {m[1]: m[2].strip() for m in found if m}


def _tool(
    name: str, description: Any, schema: dict[str, Any], function: Callable[..., Any] | None = None
) -> Tool:
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"a tool is called {name!r}, expected letters, digits, '_', '.' and '-', at most 64"
        )
    if not isinstance(description, str):
        raise OptionError(f"tool {name!r} has the description {description!r}, expected text")
    definitions = {
        f"#/{key}/{known}": inner
        for key in _DEFINITIONS for known, inner in schema.get(key, {}).items()
    }  # fmt: skip
    parameters = _without_references(schema, definitions, (), name)
    if parameters.get("type") != "object":
        raise OptionError(f"tool {name!r}: its parameters are no object, but {parameters!r}")
    return Tool(name, description, parameters, function)


def _without_references(value: Any, definitions: Any, inside: tuple[str, ...], name: str) -> Any:
    if isinstance(value, list):
        return [_without_references(inner, definitions, inside, name) for inner in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("$ref")
    if reference is None:
        return {
            key: _without_references(inner, definitions, inside, name)
            for key, inner in value.items()
            # pydantic's titles are names once more
            if key not in ("$schema", *_DEFINITIONS)
            and not (key == "title" and isinstance(inner, str))
        }  # fmt: skip
    if reference in inside:
        raise OptionError(f"tool {name!r}: its parameters are recursive at {reference!r}")
    if reference not in definitions:
        raise OptionError(f"tool {name!r}: its parameters refer to {reference!r}, which is nowhere")
    found = _without_references(definitions[reference], definitions, (*inside, reference), name)
    return {**found, **{key: inner for key, inner in value.items() if key != "$ref"}}
