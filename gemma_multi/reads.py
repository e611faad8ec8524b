"""Reads: what an answer in the making needs to have read, so that one driver can run many.

An answer, a classification or an extraction is a generator: it yields a `Read`, is sent what came
of it, and returns its result in the end. `complete` runs one; a `Driver` runs many and reads for
all of them at once, each a row of its own, and a row may join between any two reads;
`complete_together` keeps it full from an iterator, where a row that ends makes room for another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gemma_multi.engines import LAST, Engine, Session, Wanted
from gemma_multi.errors import GemmaError

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Read:
    """What a session is to read, and what is wanted of it, as NumPy."""

    session: Session
    ids: Sequence[int]
    want: Wanted = LAST


Reads = Generator[Read, Any, T]  # and what comes of them


def next_read(reads: Reads[Any], result: Any) -> Read | None:
    """Hands over what came of the last read, None at first; the next one, if there is."""
    try:
        return reads.send(result)
    except StopIteration:
        return None


def complete(reads: Reads[T]) -> T:
    """Runs one to its end."""
    result = None
    try:
        while True:
            read = reads.send(result)
            result = read.session.read(read.ids, read.want)
    except StopIteration as end:
        return end.value
    finally:
        reads.close()


def complete_together(
    engine: Engine, jobs: Iterator[Callable[[], Reads[T]]], width: int
) -> Iterator[tuple[int, T | GemmaError]]:
    """(place in `jobs`, what came of it or the error that ended it), as each is done; `width` at a
    time. `jobs` is asked for more only where there is room."""
    running: Driver[int, T] = Driver(engine)
    places = itertools.count()
    more = True
    while True:
        # newcomers come several at once, and read their prompts together
        while more and (room := width - len(running)) >= max(1, width // 4):
            new = list(itertools.islice(jobs, room))
            more = len(new) == room
            for job in new:
                running.join(next(places), job)
                yield from running.done()
        if not running:
            return
        running.read()
        yield from running.done()


class Driver(Generic[K, T]):
    """Rows on their way, each known by a key; `len` counts those that still read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[K, _Row[T]] = {}
        self._done: list[tuple[K, T | GemmaError]] = []

    def __len__(self) -> int:
        return len(self._active)

    def keys(self) -> list[K]:
        return list(self._active)

    def join(self, key: K, job: Callable[[], Reads[T]]) -> None:
        """Starts a job, which reads with the others from now on, or is done at once."""
        row = _Row(job)
        self._advance(key, row, None)

    def read(self) -> None:
        """One read for each row that is on its way."""
        active = list(self._active.items())
        results = self._engine.read(
            [row.read.session for _, row in active],
            [row.read.ids for _, row in active],
            [row.read.want for _, row in active],
        )
        for (key, row), result in zip(active, results, strict=True):
            self._advance(key, row, None if result is None else self._engine.numpy(result))

    def done(self) -> list[tuple[K, T | GemmaError]]:
        """(key, what came of it or the error that ended it) of rows that ended since last asked."""
        done, self._done = self._done, []
        return done

    def _advance(self, key: K, row: _Row[T], result: Any) -> None:
        if row.advance(result):
            self._active[key] = row
        else:
            self._active.pop(key, None)
            self._done.append((key, row.outcome))


def _without_frames(error: GemmaError) -> GemmaError:
    """An error that is kept must not keep the sessions of the frames it came through."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


class _Row(Generic[T]):
    """One of many on its way."""

    outcome: T | GemmaError

    def __init__(self, job: Callable[[], Reads[T]]) -> None:
        self._job = job
        self._reads: Reads[T] | None = None

    def advance(self, result: Any) -> bool:
        """Hands over what came of its last read; whether there is another."""
        try:
            if self._reads is None:
                self._reads = self._job()
            self.read = self._reads.send(result)
            self.read.session.check(self.read.ids, self.read.want)
            return True
        except StopIteration as end:
            self.outcome = end.value
        except GemmaError as error:
            self.outcome = _without_frames(error)
        self._reads = None  # its session gives up its place
        self.__dict__.pop("read", None)
        return False
