"""What the command line shows: streamed text wrapped at words, tables, progress, numbers.

Data goes to standard output, everything about it to standard error, so that pipes stay clean.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

notes = Console(stderr=True, highlight=False)


class WordWrap:
    """Writes streamed text, breaking lines at spaces; as it is when not on a terminal."""

    def __init__(self, file: TextIO | None = None, indent: str = "") -> None:
        self._file = file or sys.stdout
        self._indent = indent
        self._width = shutil.get_terminal_size().columns - 1 if self._file.isatty() else 0
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        for character in text:
            if character in " \n":
                self._flush_word()
                self._put(character)
            else:
                self._word += character
        self._file.flush()

    def finish(self) -> None:
        self._flush_word()
        if self._column:
            self._put("\n")
        self._file.flush()

    def _flush_word(self) -> None:
        if not self._word:
            return
        started = self._column > len(self._indent)
        if self._width and started and self._column + len(self._word) > self._width:
            self._put("\n")
        for character in self._word:
            self._put(character)
        self._word = ""

    def _put(self, character: str) -> None:
        if character == "\n":
            self._file.write("\n")
            self._column = 0
            return
        if not self._column:
            if character == " " and self._width:
                return  # the space at which a line was broken
            self._file.write(self._indent)
            self._column = len(self._indent)
        self._file.write(character)
        self._column += 1


def show_stream(pieces: Iterable[str], indent: str = "") -> None:
    wrap = WordWrap(indent=indent)
    try:
        for piece in pieces:
            wrap.write(piece)
    finally:
        wrap.finish()


def facts_table(facts: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), readable(name, value))
    return table


def readable(name: str, value: Any) -> str:
    """A number as people read it: bytes in MB, counts with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


@contextmanager
def progress_bar(label: str) -> Iterator[Any]:
    """Yields a function (done, total) that moves a bar on standard error."""
    columns = (TextColumn(label), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=notes, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
