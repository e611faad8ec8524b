"""The rows: all of them checked, some of them held out, and none on both sides.

Design choices:
- Rows that ask the same thing (but for spaces and capitals) stay together when rows are held out,
  and are refused where somebody else held them out: a score on what was learned says nothing.
- With labels, every label gives its share of the held-out rows.
- Held-out rows choose nothing, neither a step nor an option, so the score is of unseen rows.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.chat_template import Message
from gemma_multi.errors import DataError, OptionError
from gemma_multi.files import write_atomically
from gemma_multi.rows import Data, Row, open_data, read_row
from gemma_multi.scoring import LABELS, LOSS, Scoring, choose_scoring

FEWEST = 10  # rows in all
SHARE, MOST_HELD = 0.2, 200  # of the rows, where nothing is said
_NAMED = 3  # rows in a message


@dataclass(frozen=True)
class Given:
    """A row, as it came and as it was read."""

    row: Row
    raw: Mapping[str, Any]
    where: str  # file and line

    @property
    def question(self) -> list[Message] | None:
        """What the model is asked; None where its answer is no text, or nothing is asked."""
        if self.row.tools or not self.row.turns:
            return None
        return [{"role": role, "content": text} for role, text in self.row.turns[:-1]]

    @property
    def opening(self) -> list[Message]:
        """What is said before the last answer, or in a row with tools first; nothing in a text."""
        if self.row.tools:
            return [{"role": "user", "content": self.row.turns[0][1]}]
        return self.question or []

    @property
    def answer(self) -> str | None:
        return None if self.question is None else self.row.turns[-1][1]

    @property
    def asks(self) -> str:
        """Equal for rows that ask the same thing."""
        asked = self.row.turns[:-1] if self.row.turns else self.row.text
        return " ".join(f"{self.row.system} {asked}".casefold().split())


@dataclass(frozen=True)
class Split:
    """Rows to learn from and rows to ask."""

    name: str  # of the data
    training: list[Given]
    held: list[Given]
    scoring: Scoring
    notes: tuple[str, ...]  # what should be known about the rows


def split_rows(data: Data, validation: float | Data | None, score: str, seed: int) -> Split:
    """Reads and checks all rows. Raises DataError naming the row or rows that cannot be,
    OptionError."""
    name, rows = _read(data)
    if isinstance(validation, int | float) and not 0 < validation < 1:
        raise OptionError(f"validation is {validation!r}, expected a share above 0 and below 1, or "
                          "rows of their own")  # fmt: skip
    part = validation if isinstance(validation, int | float) else None
    own = None if isinstance(validation, int | float) else validation
    held = [] if own is None else _read(own)[1]
    _check_enough(name, rows, held)
    scoring = choose_scoring([one.answer for one in (*rows, *held)], score)
    if scoring.kind != LOSS:
        _check_answers(name, rows)
    if own is None:
        rows, held = _hold_out(name, rows, part, scoring, seed)
    _check_leaks(rows, held)
    if scoring.kind == LABELS:
        _check_labels(rows, held)
    return Split(name, rows, held, scoring, _notes(rows, held, scoring))


def write_rows(rows: Sequence[Given], path: Path) -> None:
    lines = (json.dumps(one.raw, default=str) + "\n" for one in rows)
    write_atomically(path, "".join(lines).encode())


def _read(data: Data) -> tuple[str, list[Given]]:
    name, numbered = open_data(data)
    rows = []
    for line, raw in numbered:
        try:
            rows.append(Given(read_row(raw, line), raw, f"{name}:{line}"))
        except OptionError as error:
            raise DataError(f"{name}:{line}: {error}") from None
    return name, rows


def _check_enough(name: str, rows: Sequence[Given], held: Sequence[Given]) -> None:
    count = len(rows) + len(held)
    if count < FEWEST or len(rows) < 2:
        there = "1 row is" if count == 1 else f"{count} rows are"
        raise DataError(
            f"{name}: {there} too few to learn from and to ask about; give it {FEWEST} or more "
            "(from 50 on a score says something)"
        )


def _check_answers(name: str, rows: Sequence[Given]) -> None:
    if len({one.answer for one in rows}) == 1:
        raise DataError(
            f"{name}: all {len(rows)} rows have the answer {rows[0].answer!r}, so a model that "
            "always says so is right; give it rows with every answer that may come (score='loss', "
            "--score loss, trains on them as they are)"
        )


def _hold_out(
    name: str, rows: Sequence[Given], part: float | None, scoring: Scoring, seed: int
) -> tuple[list[Given], list[Given]]:  # fmt: skip
    asked: dict[str, list[Given]] = defaultdict(list)
    for one in rows:
        asked[one.asks].append(one)
    alike: dict[str | None, list[str]] = defaultdict(list)
    for asks, group in asked.items():
        alike[group[0].answer if scoring.kind == LABELS else None].append(asks)
    part = min(SHARE, MOST_HELD / len(asked)) if part is None else part
    held: set[str] = set()
    rng = random.Random(seed)
    for groups in alike.values():
        rng.shuffle(groups)
        held.update(groups[: min(max(1, round(part * len(groups))), len(groups) - 1)])
    if not held:
        raise DataError(
            f"{name}: no row can be held out, since all {len(rows)} ask the same thing, or each "
            "has a label that no other has; give it other rows, or held-out rows of their own "
            "(--validation FILE)"
        )
    return [r for r in rows if r.asks not in held], [r for r in rows if r.asks in held]


def _check_leaks(rows: Sequence[Given], held: Sequence[Given]) -> None:
    learned = {one.asks: one.where for one in rows}
    leaks = [(one.where, learned[one.asks]) for one in held if one.asks in learned]
    if leaks:
        named = ", ".join(f"{there} is {here}" for there, here in leaks[:_NAMED])
        more = f" and {len(leaks) - _NAMED} more" if len(leaks) > _NAMED else ""
        raise DataError(
            f"{len(leaks)} of {len(held)} held-out rows ask what the model is taught ({named}"
            f"{more}), so a score would only say that it remembers; take them out of one of the two"
        )


def _check_labels(rows: Sequence[Given], held: Sequence[Given]) -> None:
    taught = {one.answer for one in rows}
    for one in held:
        if one.answer not in taught:
            raise DataError(
                f"{one.where}: its label {one.answer!r} is on no row to learn from, which have "
                f"{', '.join(sorted(repr(label) for label in taught))}; is it misspelled?"
            )


def _notes(rows: Sequence[Given], held: Sequence[Given], scoring: Scoring) -> tuple[str, ...]:
    notes = []
    answers: dict[str, set[str | None]] = defaultdict(set)
    for one in rows:
        answers[one.asks].add(one.answer)
    if contradicted := sum(len(found) > 1 for found in answers.values()):
        notes.append(f"{contradicted} questions have more than one answer among the rows to learn "
                     "from: the model cannot learn both")  # fmt: skip
    if scoring.kind == LABELS:
        label, count = Counter(one.answer for one in held).most_common(1)[0]
        notes.append(f"always saying {label!r} would be right on {count / len(held):.0%}")
    if len(held) < 50:
        notes.append(f"{len(held)} held-out rows are few: see how wide the intervals are")
    return tuple(notes)
