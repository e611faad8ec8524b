"""The input: read through once before any work, and then in parts that begin at fixed rows.

Design choices:
- The first reading counts the rows (for the time that is left), takes their hash (so that a run is
  resumed on the same ones), sees which columns there are and finds a file that breaks off: what is
  wrong with the file as a whole is said before the first row is asked, not hours later.
- A row that is not even a row, or that lacks the column, costs only itself.
- Parts begin at fixed rows because on some engines the last bits of a probability depend on which
  rows are read together. A part is a function of its own rows, so a resumed run, another order and
  Ray give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gemma_multi.errors import DataError
from gemma_multi.files import file_stamp
from gemma_multi.progress import Report
from gemma_multi.rows import Unreadable, open_data
from gemma_multi.tasks.batch import TEXTS

_MOST_COLUMNS = 1000  # that messages and types are kept of: rows of JSONL may each have their own
_REPORTED = 1000  # rows from one report to the next


@dataclass(frozen=True)
class InputRow:
    """One row of the input."""

    number: int  # from 0
    line: int  # of the file, from 1; the row's number in a Parquet file
    raw: Any  # a mapping, or what stands in its place

    @property
    def unreadable(self) -> str | None:
        """Why this is no row."""
        if isinstance(self.raw, Unreadable):
            return str(self.raw)
        if not isinstance(self.raw, Mapping):
            return f"is {type(self.raw).__name__}, expected an object with columns"
        return None


@dataclass(frozen=True)
class AskedRow:
    """What is asked of one row: a text or messages, or why it cannot be."""

    number: int
    item: Any = None
    problem: str | None = None


@dataclass(frozen=True)
class Input:
    """A file of rows that was read through."""

    path: Path
    column: str  # that holds what is asked
    rows: int
    sha256: str
    columns: Mapping[str, Set[type]]  # the types that are in each
    stamp: str  # of the file when it was read

    def __iter__(self) -> Iterator[InputRow]:
        return _rows(self.path)

    def asked(self, row: InputRow) -> AskedRow:
        if row.unreadable:
            return AskedRow(row.number, problem=row.unreadable)
        if self.column not in row.raw:
            return AskedRow(row.number, problem=f"has no column {self.column!r}")
        return AskedRow(row.number, _without_nulls(row.raw[self.column]))

    def check_unchanged(self) -> None:
        """Raises DataError where the file is another than the one that was read through."""
        if not self.path.is_file() or file_stamp(self.path) != self.stamp:
            raise DataError(f"{self.path}: was changed while its rows were asked; begin again")


@dataclass(frozen=True)
class Missing:
    """The parts that are not done: (number, what is asked of its rows) of each."""

    source: Input
    rows_per_part: int
    done: Set[int]

    def __iter__(self) -> Iterator[tuple[int, list[AskedRow]]]:
        rows = iter(self.source)
        for number in range(self.count):
            part = islice(rows, self.rows_per_part)
            if number not in self.done:
                yield number, [self.source.asked(row) for row in part]
            else:
                deque(part, maxlen=0)

    @property
    def count(self) -> int:
        """How many parts there are, with those that are done."""
        return -(-self.source.rows // self.rows_per_part)

    @property
    def left(self) -> int:
        """How many rows are not done."""
        sizes = (
            min(self.rows_per_part, self.source.rows - number * self.rows_per_part)
            for number in range(self.count) if number not in self.done
        )  # fmt: skip
        return sum(sizes)


def read_through(
    path: Path, column: str | None, carried: Sequence[str], report: Report
) -> Input:  # fmt: skip
    """Looks at every row. `column` is what holds the texts, None for the first of `TEXTS` that is
    there; `carried` are others that must be. Raises DataError naming the line where the file breaks
    off, a column that no row has, a file without rows."""
    rows, columns = 0, dict[str, set[type]]()
    name, numbered = open_data(path)
    stamp = file_stamp(path)
    for _, raw in numbered:
        rows += 1
        if isinstance(raw, Mapping):
            for key, value in raw.items():
                if key in columns or len(columns) < _MOST_COLUMNS:
                    columns.setdefault(key, set()).add(type(value))
        if rows % _REPORTED == 0:
            report(rows, 0)
    if not rows:
        raise DataError(f"{name}: has no rows")
    there = ", ".join(map(repr, columns)) or "none"
    if column is None:
        column = next((one for one in TEXTS if one in columns), None)
        if column is None:
            raise DataError(
                f"{name}: has no column {', '.join(map(repr, TEXTS[:-1]))} or {TEXTS[-1]!r}, only "
                f"{there}; say which one holds the texts"
            )
    for one in (column, *carried):
        if one not in columns:
            raise DataError(f"{name}: has no column {one!r}, only {there}")
    found = Input(path.absolute(), column, rows, _sha256(path), columns, stamp)
    found.check_unchanged()
    return found


def _rows(path: Path) -> Iterator[InputRow]:
    for number, (line, raw) in enumerate(open_data(path)[1]):
        yield InputRow(number, line, raw)


def _without_nulls(item: Any) -> Any:
    """Messages as they were: in Parquet all of a list have the same fields."""
    if not isinstance(item, list):
        return item
    return [
        {key: value for key, value in one.items() if value is not None}
        if isinstance(one, Mapping) else one
        for one in item
    ]  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
