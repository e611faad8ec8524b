"""Output: where the answers go, and the rows that failed; never over what is there, unless asked.

Both files are made when the last part is done, from the parts and the input beside each other, and
take their names only when they are whole.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemma_multi.batch.answers import Columns
from gemma_multi.batch.kinds import COUNT, TEXT, Kind
from gemma_multi.batch.options import BatchOptions
from gemma_multi.batch.parts import Parts
from gemma_multi.batch.source import Input, InputRow
from gemma_multi.batch.writing import WRITERS, Write, carried_kinds, new_file
from gemma_multi.errors import OptionError
from gemma_multi.files import check_output
from gemma_multi.rows import SUFFIXES

_ERRORS = ".errors.jsonl"
_OWN = ("row", "line", "error")


class Output:
    """Two files that are to be written."""

    def __init__(self, path: Path, source: Path, options: BatchOptions) -> None:
        """Raises OptionError for names that cannot be, and for a file that is there."""
        self.path, self._options = path, options
        self.errors = Path(options.errors or path.with_name(path.stem + _ERRORS))
        for one, known, what in (
            (source, SUFFIXES, "an input"), (path, tuple(WRITERS), "an output"),
            (self.errors, (".jsonl",), "a list of errors"),
        ):  # fmt: skip
            if one.suffix.lower() not in known:
                expected = ", ".join(known)
                raise OptionError(f"{one}: {what} is a {expected} file, received {one.suffix!r}")
        if len({one.absolute() for one in (source, path, self.errors)}) < 3:
            raise OptionError(f"{path}: input, output and errors are three files; two are the same")

    def check_free(self) -> None:
        """Raises OptionError where a file is there that may not be replaced."""
        for one in (self.path, self.errors):
            if one.exists() and not (self._options.overwrite and one.is_file()):
                raise OptionError(
                    f"{one}: exists already; choose another name, or replace it with --overwrite"
                )
            if not one.exists():
                check_output(one, directory=False)

    def kinds(self, source: Input, answers: dict[str, Kind]) -> dict[str, Any]:
        """Of the columns that are written, in order. Raises OptionError where two have one name."""
        carried = carried_kinds(source, self._options.carried)
        for name in carried:
            if name in answers or name in _OWN:
                raise OptionError(
                    f"the column {name!r} cannot be carried along: one of the answers is called so"
                )
        number = {} if self._options.key else {"row": COUNT}
        return {**number, **carried, **answers}

    def write(self, parts: Parts, source: Input, kinds: dict[str, Any]) -> int:
        """Puts the parts together; how many rows failed."""
        failed, replace = 0, self._options.overwrite
        key = self._options.key
        of_errors = {"row": COUNT, "line": COUNT, **({key: kinds[key]} if key else {})}
        fail: Write | None = None
        source.check_unchanged()
        with ExitStack() as files:
            write = files.enter_context(new_file(self.path, kinds, replace))
            answers = parts.answers()
            for row, answer in zip(source, answers, strict=True):
                whole = self._beside(row, answer)
                if "error" not in whole:
                    write(whole)
                    continue
                if fail is None:
                    columns = {**of_errors, "error": TEXT}
                    fail = files.enter_context(new_file(self.errors, columns, replace))
                fail({**whole, "line": row.line})
                failed += 1
            source.check_unchanged()
        if not failed and replace:
            self.errors.unlink(missing_ok=True)  # of an output that was replaced
        return failed

    def _beside(self, row: InputRow, answer: Columns) -> Columns:
        """An answer with the columns that are carried along."""
        there = {} if row.unreadable else row.raw
        carried = {name: there.get(name) for name in self._options.carried}
        key = self._options.key
        if key and carried[key] is None and "error" not in answer:
            answer = {"row": row.number, "error": f"has no {key!r} to be known by"}
        return {**carried, **answer}
