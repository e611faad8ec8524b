"""How many answers are right, and how sure that is.

Design choices:
- What is counted follows from the rows (`choose_scoring`): few distinct answers are labels, JSON
  objects have fields, other short answers are right or wrong as a whole, and of prose only the loss
  means something. The choice says why it was made.
- Every figure comes with what 95 of 100 samples of so many rows would give: Wilson's interval of a
  share, which holds for few rows and near 0 and 1, and for a perplexity a bootstrap over rows.
- Spaces around an answer do not count, and neither does the order of a JSON object's keys.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_multi.errors import OptionError
from gemma_multi.files import unique_keys

LABELS, FIELDS, EXACT, LOSS = "labels", "fields", "exact", "loss"
SCORES = {
    LABELS: "share of right labels",
    FIELDS: "share of right JSON objects, and F1 of each field",
    EXACT: "share of right answers",
    LOSS: "perplexity of the answers",
}
NO_LABEL = "no label"  # stands in a confusion for an answer that is none
MOST_LABELS = 30
_LABEL_LENGTH, _SHORT = 60, 120  # characters of an answer
_ROWS_A_LABEL = 3  # at least, on average; else answers that differ only seem to be few
_Z = 1.959964  # of a normal distribution, 95% within
_RESAMPLES = 2000


@dataclass(frozen=True)
class Scoring:
    """What is counted, of `SCORES`, and why. `labels` are in the order of how often they come."""

    kind: str
    why: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A figure of `count` rows and its 95% interval."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of_error(cls, value: float, error: float, count: int) -> Estimate:
        """Of a figure whose standard error is known."""
        return cls(value, value - _Z * error, value + _Z * error, count)


@dataclass(frozen=True)
class PartScore:
    """Of one label, or of one field of JSON answers, in which items of a list count one by one."""

    precision: Estimate  # right ones among those that were given; 0 where none was
    recall: Estimate  # right ones among those that were expected, whose count is the support
    f1: float

    @classmethod
    def of(cls, hits: int, given: int, expected: int) -> PartScore:
        precision, recall = (
            share(hits, count) if count else Estimate(0.0, 0.0, 1.0, 0)
            for count in (given, expected)
        )  # fmt: skip
        return cls(precision, recall, 2 * hits / max(1, given + expected))


@dataclass(frozen=True)
class Score:
    """Of some answers. `right` says which are (nothing for a loss)."""

    kind: str
    estimate: Estimate
    right: tuple[bool, ...] = ()
    confusion: dict[str, dict[str, int]] = field(default_factory=dict)  # expected -> given -> rows
    fields: dict[str, PartScore] = field(default_factory=dict)

    @property
    def labels(self) -> dict[str, PartScore]:
        """Of a confusion."""
        given = {
            label: sum(row[label] for row in self.confusion.values()) for label in self.confusion
        }
        return {
            label: PartScore.of(row[label], given[label], sum(row.values()))
            for label, row in self.confusion.items()
        }


def choose_scoring(answers: Sequence[str | None], wanted: str = "auto") -> Scoring:
    """What suits the rows whose expected answers these are; None for one that cannot be asked for,
    as of a plain text. Raises OptionError where what is `wanted` cannot be."""
    if wanted != "auto" and wanted not in SCORES:
        raise OptionError(f"score is {wanted!r}, expected auto or one of {', '.join(SCORES)}")
    given = [answer.strip() for answer in answers if answer is not None]
    labels = tuple(label for label, _ in Counter(given).most_common())
    if wanted != "auto":
        if wanted != LOSS and len(given) < len(answers):
            raise OptionError(
                f"score {wanted!r} needs rows with a question and a text for an answer; these have "
                f"plain texts or calls of functions, whose score is {LOSS!r}"
            )
        if wanted == FIELDS and (bad := next((a for a in given if read_object(a) is None), None)):
            raise OptionError(f"score 'fields' needs JSON objects for answers, received {bad!r}")
        return Scoring(wanted, "as asked for", labels if wanted == LABELS else ())
    if len(given) < len(answers):
        return Scoring(LOSS, "there are rows without a text to ask for")
    if all(read_object(answer) is not None for answer in given):
        return Scoring(FIELDS, "every answer is a JSON object")
    few = len(labels) <= min(MOST_LABELS, len(given) / _ROWS_A_LABEL)
    if few and all(len(label) <= _LABEL_LENGTH for label in labels):
        return Scoring(LABELS, f"{len(given)} rows have {len(labels)} different answers", labels)
    if np.median([len(answer) for answer in given]) <= _SHORT:
        return Scoring(EXACT, "answers are short and differ")
    return Scoring(LOSS, "answers are prose, which can be right in many ways")


def score(scoring: Scoring, expected: Sequence[str], given: Sequence[str]) -> Score:
    """Of answers that were asked for; see `perplexity_score` for a loss."""
    expected, given = [[text.strip() for text in texts] for texts in (expected, given)]
    if scoring.kind == FIELDS:
        wanted, found = ([read_object(text) for text in texts] for texts in (expected, given))
        right = tuple(a == b for a, b in zip(wanted, found, strict=True))
        fields = field_scores(wanted, found)
        return Score(FIELDS, share(sum(right), len(right)), right, fields=fields)
    right = tuple(a == b for a, b in zip(expected, given, strict=True))
    counted = confusion(expected, given, scoring.labels) if scoring.kind == LABELS else {}
    return Score(scoring.kind, share(sum(right), len(right)), right, counted)


def perplexity_score(losses: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Score:
    """Of rows with the sum of losses in nats, and the number of tokens, of each."""
    rows = np.array([losses, tokens], float)
    drawn = np.random.default_rng(seed).integers(0, rows.shape[1], (_RESAMPLES, rows.shape[1]))
    sums = rows[:, drawn].sum(-1)
    low, high = np.exp(np.percentile(sums[0] / sums[1], (2.5, 97.5)))
    value = math.exp(rows[0].sum() / rows[1].sum())
    return Score(LOSS, Estimate(value, float(low), float(high), rows.shape[1]))


def share(right: int, count: int) -> Estimate:
    """`right` of `count`, with Wilson's interval."""
    if not count:
        return Estimate(math.nan, 0.0, 1.0, 0)
    p, weight = right / count, _Z * _Z / count
    centre = (p + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(p * (1 - p) / count + weight / (4 * count))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), count)


def confusion(
    expected: Sequence[str], given: Sequence[str], labels: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Expected label -> given label -> rows; an answer that is no label counts as `NO_LABEL`."""
    columns = [*labels, NO_LABEL]
    counted = {label: dict.fromkeys(columns, 0) for label in labels}
    for want, got in zip(expected, given, strict=True):
        counted[want][got if got in counted else NO_LABEL] += 1
    return counted


def given_labels(confusion: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A confusion's columns: all labels, and what is none if there was any."""
    some = any(row[NO_LABEL] for row in confusion.values())
    return [*confusion, *([NO_LABEL] if some else [])]


def field_scores(
    expected: Sequence[dict[str, Any] | None], given: Sequence[dict[str, Any] | None]
) -> dict[str, PartScore]:
    """Of each field of the expected objects; None for what is no object."""
    hits, wanted, found = Counter[str](), Counter[str](), Counter[str]()
    for want, got in zip(expected, given, strict=True):
        one, other = Counter(_items(want)), Counter(_items(got))
        for counts, items in ((hits, one & other), (wanted, one), (found, other)):
            for (name, _), times in items.items():
                counts[name] += times
    return {name: PartScore.of(hits[name], found[name], wanted[name]) for name in wanted}


def _items(value: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [
        (name, json.dumps(item, sort_keys=True))
        for name, inside in (value or {}).items()
        for item in (inside if isinstance(inside, list) else [inside])
    ]


def read_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None for any other text."""
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
