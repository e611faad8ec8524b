"""Kinds of columns: known before the first row is answered, whatever file they are written to.

JSON keeps values as they are. CSV has text for everything; Parquet has a type for each kind, and
JSON text where the type would depend on the rows (an object of any schema).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Set
from typing import Any

from gemma_multi.constraints.schema import write_json

# a tuple of names is a number for each
Kind = str | tuple[str, ...]
TEXT, COUNT, NUMBER, FLAG, VECTOR, JSON = "text", "count", "number", "flag", "vector", "json"


def kind_of(types: Set[type]) -> Kind:
    """Of a column that holds values of these types."""
    found = types - {type(None)}
    if found and found <= {int, float}:
        return COUNT if found == {int} else NUMBER
    return TEXT if found == {str} else FLAG if found == {bool} else JSON


def plain(value: Any) -> Any:
    """What JSON has a form for: a date or a decimal as text, bytes in base64, no number that is
    none."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    return json.loads(write_json(value, str))


def as_line(row: Mapping[str, Any]) -> bytes:
    """Readable in every script; half a surrogate pair, which UTF-8 cannot hold, as an escape."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


def as_cell(value: Any) -> str:
    """Of CSV: nothing for nothing, JSON for what is neither text nor a number."""
    simple = plain(value)
    if simple is None:
        return ""
    return simple if isinstance(simple, str) else json.dumps(simple, ensure_ascii=False)


def for_arrow(value: Any, kind: Any) -> Any:
    """As pyarrow takes it for a column of this kind."""
    if kind == JSON and value is not None:
        value = json.dumps(plain(value), ensure_ascii=False)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def arrow_schema(kinds: Mapping[str, Any]) -> Any:
    """pyarrow's Schema; a kind may also be one of its types."""
    import pyarrow as pa

    types = {TEXT: pa.string(), JSON: pa.string(), COUNT: pa.int64(), NUMBER: pa.float64(),
             FLAG: pa.bool_(), VECTOR: pa.list_(pa.float32())}  # fmt: skip

    def of(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return pa.struct([(name, pa.float64()) for name in kind])
        return types[kind] if isinstance(kind, str) else kind

    return pa.schema([(name, of(kind)) for name, kind in kinds.items()])
