"""Examples: tokenised rows on disk, mapped into memory, with what the loss looks at.

Rows are tokenised once, as they are read, and go straight to a file of 32-bit integers: the token
id, and in bit 30 whether a loss is taken on it. What stays in memory is three numbers a row, so
that a million rows take some 40 MB.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gemma_multi.errors import DataError
from gemma_multi.rows import Data, Row, data_name, encode_row, read_rows
from gemma_multi.tokenizer import Tokenizer

HAS_LOSS = 1 << 30
SHORTEST = 8  # tokens; a max_length below this holds no conversation
LOSS_ON = ("answer", "all")
TOO_LONG = ("refuse", "cut", "skip")


def checked_rows(data: Data) -> Data:
    """`data`, all of its rows read once, before something that takes minutes; rows that can be read
    only once are kept. Raises DataError for a bad one, or too few."""
    if isinstance(data, Iterator):
        data = list(data)
    check_enough(data_name(data), sum(1 for _ in read_rows(data)))
    return data


def check_enough(name: str, rows: int) -> None:
    """Raises DataError for too few to learn from."""
    if rows < 2:
        raise DataError(f"{name}: one row is too few to learn from; give it 10 or more")


def tokenize(tokenizer: Tokenizer, row: Row, loss_on: str = "answer") -> np.ndarray:
    """A row as `i32[T]`, HAS_LOSS set where a loss is taken. Texts end with `<eos>`."""
    ids, said = encode_row(tokenizer, row)
    if not row.turns:
        ids, said = [*ids, tokenizer.eos_id], [*said, True]
    entries = np.array(ids, np.int32)
    loss_mask = np.array(said) if loss_on == "answer" else np.ones(len(ids), bool)
    loss_mask[0] = False  # nothing comes before <bos> that could predict it
    return entries | np.where(loss_mask, HAS_LOSS, 0).astype(np.int32)


def example_hash(entries: np.ndarray) -> int:
    """Of 64 bits; equal examples have equal ones."""
    digest = hashlib.blake2b(entries.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Examples:
    """What training reads. Example `i` has `lengths[i]` tokens and came from `where(i)`."""

    name: str  # of the data, for messages
    entries: np.ndarray  # i32, all examples one after the other
    offsets: np.ndarray  # i64[N + 1]
    lines: np.ndarray  # i64[N], of the source
    hashes: np.ndarray  # u64[N], of the entries of an example
    fingerprint: str  # SHA-256 of all entries, in order
    skipped: int = 0  # rows too long, omitted because that was asked for
    cut: int = 0  # rows too long, cut because that was asked for
    chosen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def lengths(self) -> np.ndarray:
        return (self.offsets[1:] - self.offsets[:-1])[self.chosen]

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids `i32[T]`, loss mask `bool[T]`)."""
        at = self.chosen[i]
        entries = self.entries[self.offsets[at] : self.offsets[at + 1]]
        return entries & (HAS_LOSS - 1), entries >= HAS_LOSS

    def where(self, i: int) -> str:
        return f"{self.name}:{self.lines[self.chosen[i]]}"

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """(the rest, about `share` of the examples, at least one). Equal examples stay together,
        so that nothing which is validated on was trained on."""
        unique = np.unique(self.hashes[self.chosen])
        order = np.random.default_rng(seed).permutation(len(unique))
        taken = unique[order[: min(max(1, round(share * len(unique))), len(unique) - 1)]]
        held = np.isin(self.hashes[self.chosen], taken)
        return self._only(self.chosen[~held]), self._only(self.chosen[held])

    def count_shared(self, other: Examples) -> int:
        """How many examples of `other` are here as well."""
        return int(np.isin(other.hashes[other.chosen], self.hashes[self.chosen]).sum())

    def _only(self, chosen: np.ndarray) -> Examples:
        return Examples(self.name, self.entries, self.offsets, self.lines, self.hashes,
                        self.fingerprint, self.skipped, self.cut, chosen)  # fmt: skip


def prepare(
    data: Data,
    tokenizer: Tokenizer,
    path: Path,
    *,
    max_length: int,
    loss_on: str = "answer",
    too_long: str = "refuse",
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Tokenises `data` into the file `path`. Raises DataError naming the bad row."""
    name = data_name(data)
    offsets, lines, hashes = array("q", [0]), array("q"), array("Q")
    sha, skipped, cut = hashlib.sha256(), 0, 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for row in read_rows(data):
            entries = tokenize(tokenizer, row, loss_on)
            if len(entries) > max_length:
                if too_long == "refuse":
                    raise DataError(
                        f"{name}:{row.line}: {len(entries)} tokens, but max_length is "
                        f"{max_length}; "
                        "raise it, or choose too_long='cut' or 'skip' (`gemma-multi data check` "
                        "shows all lengths)"
                    )
                if too_long == "skip" or not (entries[:max_length] >= HAS_LOSS).any():
                    skipped += 1
                    continue
                entries, cut = entries[:max_length], cut + 1
            content = entries.tobytes()
            file.write(content)
            sha.update(len(entries).to_bytes(4, "little") + content)
            offsets.append(offsets[-1] + len(entries))
            lines.append(row.line)
            hashes.append(example_hash(entries))
            if progress and len(lines) % 1000 == 0:
                progress(len(lines))
    if len(lines) < 1:
        raise DataError(f"{name}: has no rows" + " that fit max_length" * bool(skipped))
    return Examples(
        name=name,
        entries=np.memmap(path, np.int32, "r"),
        offsets=np.frombuffer(offsets, np.int64),
        lines=np.frombuffer(lines, np.int64),
        hashes=np.frombuffer(hashes, np.uint64),
        fingerprint=sha.hexdigest(),
        skipped=skipped,
        cut=cut,
        chosen=np.arange(len(lines)),
    )
