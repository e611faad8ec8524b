"""How gemma.cpp writes its structures: as 32-bit words without names, in a fixed order.

A record is the number of its words and then its fields; a reader that knows fewer skips the rest,
and one that knows more has defaults for those. Numbers, flags and enumerations are a word each; a
text is the number of its words, then ASCII filled up with zeros; a list is its length, then each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TypeVar

import numpy as np

from gemma_multi.errors import CheckpointError

MOST_TEXT_WORDS = 64
_MOST_LISTED = 1 << 16

T = TypeVar("T")
Words = list[int]


def number(value: int) -> Words:
    """Of either sign."""
    return [value & 0xFFFFFFFF]


def real(value: float) -> Words:
    return list(struct.unpack("<I", struct.pack("<f", value)))


def text(value: str) -> Words:
    data = value.encode("ascii")
    data += bytes(-len(data) % 4)
    return [len(data) // 4, *struct.unpack(f"<{len(data) // 4}I", data)]


def listed(items: Iterable[Words]) -> Words:
    held = list(items)
    return [len(held), *chain.from_iterable(held)]


def record(*fields: Words) -> Words:
    held = list(chain.from_iterable(fields))
    return [len(held), *held]


class Record:
    """Reads one record's fields in their order. Raises CheckpointError for what cannot be."""

    def __init__(self, words: np.ndarray, begin: int, where: str, limit: int | None = None) -> None:
        """`words` from `begin`, where the record's length stands; `where` is its name, for people;
        `limit` is where what it is part of ends."""
        self._words, self._where = words, where
        limit = len(words) if limit is None else limit
        if begin >= limit:
            raise CheckpointError(f"{where} ends before its length")
        self._at = begin + 1
        self.end = self._at + int(words[begin])
        if self.end > limit:
            raise CheckpointError(
                f"{where} claims {int(words[begin])} words, but only {limit - self._at} follow"
            )

    def skip(self, count: int) -> None:
        """Passes over fields of a word each."""
        self._at = min(self._at + count, self.end)

    def number(self, default: int = 0) -> int:
        if self._at >= self.end:
            return default
        self._at += 1
        return int(self._words[self._at - 1])

    def signed(self, default: int = 0) -> int:
        value = self.number(default)
        return value - (1 << 32) if value >= 1 << 31 else value

    def flag(self, default: bool = False) -> bool:
        value = self.number(int(default))
        if value > 1:
            raise CheckpointError(f"{self._where} has a flag of {value}, expected 0 or 1")
        return bool(value)

    def real(self, default: float = 0.0) -> float:
        if self._at >= self.end:
            return default
        value = float(struct.unpack("<f", struct.pack("<I", self.number()))[0])
        if not math.isfinite(value):
            raise CheckpointError(f"{self._where} has a number that is {value}")
        return value

    def text(self) -> str:
        count = self._count("a text", MOST_TEXT_WORDS)
        data = self._words[self._at : self._at + count].astype("<u4").tobytes()
        self._at += count
        return data.rstrip(b"\0").decode("ascii", "replace")

    def listed(self, read: Callable[[], T]) -> list[T]:
        """Each of a list as `read` finds it."""
        return [read() for _ in range(self._count("a list", _MOST_LISTED))]

    def record(self, what: str) -> Record:
        """A record in this one."""
        inner = Record(self._words, self._at, f"{self._where}: {what}", self.end)
        self._at = inner.end
        return inner

    def _count(self, what: str, most: int) -> int:
        count = self.number()
        if count > min(most, self.end - self._at):
            raise CheckpointError(
                f"{self._where} has {what} of {count}, but only {self.end - self._at} words follow"
            )
        return count
