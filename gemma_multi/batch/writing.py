"""Writing: rows into a JSONL, CSV or Parquet file, one at a time, whatever their number."""

from __future__ import annotations

import csv
import filecmp
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_multi.batch.kinds import arrow_schema, as_cell, as_line, for_arrow, kind_of, plain
from gemma_multi.batch.source import Input
from gemma_multi.errors import BatchError, OptionError
from gemma_multi.files import renamed_when_whole

_ROW_GROUP = 8192
Write = Callable[[Mapping[str, Any]], Any]


def carried_kinds(source: Input, names: tuple[str, ...]) -> dict[str, Any]:
    """Of each column that is carried along: its type in Parquet, else what its values are."""
    if source.path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(source.path)
        return {name: schema.field(name).type for name in names}
    return {name: kind_of(source.columns[name]) for name in names}


@contextmanager
def new_file(path: Path, kinds: Mapping[str, Any], replace: bool) -> Iterator[Write]:
    """A function that writes a row; the file is there when the block ends without an error. Raises
    OptionError where another is by then, unless it may be replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_whole(path) as temporary:
        with WRITERS[path.suffix.lower()](temporary, kinds) as write:
            yield write
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # an equal one is this run's own, which was killed before it had tidied up
        if path.exists() and not (replace or filecmp.cmp(temporary, path, shallow=False)):
            raise OptionError(f"{path}: is there now, and was not; replace it with --overwrite")


@contextmanager
def _jsonl(path: Path, kinds: Mapping[str, Any]) -> Iterator[Write]:
    with path.open("wb") as file:
        yield lambda row: file.write(as_line({name: plain(row.get(name)) for name in kinds}))


@contextmanager
def _csv(path: Path, kinds: Mapping[str, Any]) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(kinds)
        yield lambda row: writer.writerow([as_cell(row.get(name)) for name in kinds])


@contextmanager
def _parquet(path: Path, kinds: Mapping[str, Any]) -> Iterator[Write]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OptionError(f"{path}: Parquet needs: pip install pyarrow") from None

    schema = arrow_schema(kinds)
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        file.write_table(pyarrow.Table.from_pylist(waiting, schema))
        waiting.clear()

    def write(row: Mapping[str, Any]) -> None:
        waiting.append({name: for_arrow(row.get(name), kind) for name, kind in kinds.items()})
        if len(waiting) == _ROW_GROUP:
            flush()

    try:
        with pyarrow.parquet.ParquetWriter(path, schema) as file:
            yield write
            flush()
    except (pyarrow.ArrowException, OverflowError) as error:
        raise BatchError(f"Parquet cannot hold the rows: {error}; write .jsonl") from None


WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
