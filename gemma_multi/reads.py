"""Reads: what an answer in the making needs to have read, so that one driver can run many.

An answer, a classification or an extraction is a generator: it yields a `Read`, is sent what came
of it, and returns its result in the end. `complete` runs one; `complete_together` runs many side by
side and reads for all of them at once, each a row of its own: a row that ends makes room for
another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gemma_multi.engines import LAST, Engine, Session, Wanted
from gemma_multi.errors import GemmaError

T = TypeVar("T")


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
    active: dict[int, _Row[T]] = {}
    places = itertools.count()
    more = True
    while True:
        # newcomers come several at once, and read their prompts together
        while more and (room := width - len(active)) >= max(1, width // 4):
            new = list(itertools.islice(jobs, room))
            more = len(new) == room
            for job in new:
                place, row = next(places), _Row(job)
                if row.advance(None):
                    active[place] = row
                else:
                    yield place, row.outcome
        if not active:
            return
        results = engine.read(
            [row.read.session for row in active.values()],
            [row.read.ids for row in active.values()],
            [row.read.want for row in active.values()],
        )
        done = [
            place
            for (place, row), result in zip(active.items(), results, strict=True)
            if not row.advance(None if result is None else engine.numpy(result))
        ]
        for place in done:
            yield place, active.pop(place).outcome


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
