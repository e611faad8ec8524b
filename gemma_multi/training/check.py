"""`data check`: what is in training data, before an hour is spent on it.

Counts, lengths in tokens, duplicates, rows that are too long, and rows that are in the validation
data as well. A bad row does not end the check: all of them are found, the first few are named.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gemma_multi.errors import OptionError
from gemma_multi.rows import Data, data_name, open_data, read_row
from gemma_multi.tokenizer import Tokenizer
from gemma_multi.training.examples import HAS_LOSS, example_hash, tokenize

NAMED = 10  # bad, long or double rows that are named


@dataclass
class DataReport:
    """What was found. `ok` where training can begin as `finetune` is by default."""

    name: str
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)  # messages, completion, text
    roles: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    answer_tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # shortest, median, 95%, longest
    histogram: list[tuple[int, int]] = field(default_factory=list)  # (up to tokens, rows)
    max_length: int = 512
    too_long: int = 0
    too_long_lines: list[int] = field(default_factory=list)
    duplicates: int = 0
    duplicate_lines: list[int] = field(default_factory=list)
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    leaked: int | None = None  # rows that the validation data has as well
    leaked_lines: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.rows > 1 and not self.bad and not self.too_long

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def check_data(
    data: Data,
    tokenizer: Tokenizer,
    *,
    validation: Data | None = None,
    max_length: int = 512,
    progress: Callable[[int], None] | None = None,
) -> DataReport:
    """Reads all of `data`, as a stream. Raises DataError for what is no data at all."""
    known = None
    if validation is not None:
        known = {digest for _, digest, _ in _rows(validation, tokenizer, DataReport(""), None)}
    report = DataReport(data_name(data), max_length=max_length, leaked=None if known is None else 0)
    seen: set[int] = set()
    lengths = array("q")
    for line, digest, length in _rows(data, tokenizer, report, progress):
        lengths.append(length)
        if length > max_length:
            report.too_long += 1
            report.too_long_lines += [line][: NAMED - len(report.too_long_lines)]
        if digest in seen:
            report.duplicates += 1
            report.duplicate_lines += [line][: NAMED - len(report.duplicate_lines)]
        seen.add(digest)
        if known is not None and digest in known:
            report.leaked = (report.leaked or 0) + 1
            report.leaked_lines += [line][: NAMED - len(report.leaked_lines)]
    if lengths:
        found = np.frombuffer(lengths, np.int64)
        report.lengths = [int(x) for x in np.percentile(found, (0, 50, 95, 100))]
        report.histogram = _histogram(found)
    return report


def _rows(
    data: Data, tokenizer: Tokenizer, report: DataReport, progress: Callable[[int], None] | None
) -> Any:
    """(line, digest, tokens) of each good row; the rest goes into the report."""
    kinds, roles = Counter[str](), Counter[str]()
    name, numbered = open_data(data)
    for line, raw in numbered:
        report.rows += 1
        if progress and report.rows % 1000 == 0:
            progress(report.rows)
        try:
            row = read_row(raw, line)
        except OptionError as error:
            report.bad += 1
            report.bad_rows += [f"{name}:{line}: {error}"][: NAMED - len(report.bad_rows)]
            continue
        kinds[row.kind] += 1
        roles.update(row.roles)
        entries = tokenize(tokenizer, row)
        report.tokens += len(entries)
        report.answer_tokens += int((entries >= HAS_LOSS).sum())
        yield line, example_hash(entries), len(entries)
    report.kinds, report.roles = dict(kinds), dict(roles)


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """(up to so many tokens, rows), in about a dozen round steps."""
    longest = int(lengths.max())
    step = next(s * 10**e for e in range(9) for s in (1, 2, 5) if s * 10**e * 12 >= longest)
    counts = np.bincount((lengths - 1) // step)
    first = int(np.flatnonzero(counts)[0])
    return [(step * (i + 1), int(counts[i])) for i in range(first, len(counts))]
