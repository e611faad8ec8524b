"""What the command line shows: streamed text wrapped at words, tables, progress, numbers.

Data goes to standard output, everything about it to standard error, so that pipes stay clean.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich import progress as rich_progress
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

notes = Console(stderr=True, highlight=False)


class WordWrap:
    """Writes streamed text, on a terminal with lines broken at spaces.

    A word waits until it is whole or has filled a line by itself, as text without spaces does.
    """

    def __init__(self, file: TextIO | None = None, indent: str = "") -> None:
        self._file = file or sys.stdout
        self._indent = indent
        self._width = shutil.get_terminal_size().columns - 1 if self._file.isatty() else 0
        self._line = ""  # what the current line shows
        self._spaces = self._word = ""  # what comes next, once the word is whole

    def write(self, text: str) -> None:
        for character in text:
            if character == "\n":
                self._put_word()
                self._end_line()
            elif character == " ":
                if self._word:
                    self._put_word()
                self._spaces += character
            else:
                self._word += character
                if cell_len(self._indent + self._word) >= self._width > 0:
                    self._put_word()
        if not self._width:
            self._put_word()
        self._file.flush()

    def finish(self) -> None:
        self._put_word()
        if self._line:
            self._end_line()
        self._file.flush()

    def _put_word(self) -> None:
        addition = self._spaces + self._word
        if self._width and self._line and cell_len(self._line + addition) > self._width:
            self._end_line()
            addition = self._word
        if not self._line and addition:
            addition = self._indent + addition
        self._file.write(addition)
        self._line += addition
        self._spaces = self._word = ""

    def _end_line(self) -> None:
        self._file.write("\n")
        self._line = self._spaces = ""


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
        table.add_row(name.replace("_", " "), Text(readable(name, value)))
    return table


def plain_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Without lines; the first column is of words, the others of figures."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def readable(name: str, value: Any) -> str:
    """A number as people read it: bytes in MB, counts with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if name.endswith("bytes"):
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


@contextmanager
def progress_bar(label: str, unit: str = "") -> Iterator[Any]:
    """Yields a function (done, total) that moves a bar on standard error; with a `unit` it also
    says how many are done, and how many a second. What was done before the first call is no speed.
    """
    text = rich_progress.TextColumn
    columns = [text(label), rich_progress.BarColumn(), text("{task.percentage:3.0f}%")]
    if unit:
        columns += [text("{task.completed:,} " + unit), _Speed(unit)]
    quiet = not notes.is_terminal
    with rich_progress.Progress(
        *columns, rich_progress.TimeRemainingColumn(), console=notes, transient=True, disable=quiet
    ) as progress:
        task = progress.add_task(label, total=None)
        begun = False

        def show(done: int, total: int) -> None:
            nonlocal begun
            (progress.update if begun else progress.reset)(
                task, completed=done, total=total or None
            )  # fmt: skip
            begun = True

        yield show


class _Speed(rich_progress.ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: rich_progress.Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f} {self._unit}/s")
