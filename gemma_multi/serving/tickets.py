"""Tickets: what a request asks of a model, and what comes of it, from one thread to another.

A Ticket is made on the event loop that waits for it, and holds an AnswerJob for each answer. A
worker begins the jobs on its own thread; what comes of them goes back to the loop, piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_multi.errors import ConstraintError
from gemma_multi.generation import TokenLogprobs
from gemma_multi.model import Model
from gemma_multi.reads import Reads
from gemma_multi.streaming import TextStream


@dataclass(frozen=True)
class Piece:
    """Some more of an answer's text, and what was told of the tokens since the last piece."""

    text: str
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class Ended:
    """An answer is done: a GenerationResult, what else a task gives, or what it failed with."""

    outcome: Any
    logprobs: Sequence[TokenLogprobs] = ()  # of tokens after the last piece


Event = Piece | Ended
Tell = Callable[[Event], None]


class AnswerJob(Protocol):
    """One answer that is asked for."""

    def begin(self, model: Model, tell: Tell) -> Reads[Any]:
        """Its reads, on the worker's thread. Raises GemmaError for what cannot be answered."""

    def cancel(self) -> None:
        """From any thread: ends it as soon as can be."""


class Generation:
    """An AnswerJob: a text, as `Model.stream` gives it."""

    def __init__(self, prompt: Any, options: Mapping[str, Any]) -> None:
        self._prompt, self._options = prompt, options
        self._cancelled = False
        self._stream: Callable[[], TextStream | None] = lambda: None

    def begin(self, model: Model, tell: Tell) -> Reads[Any]:
        stream = model.stream(self._prompt, **self._options)
        self._stream = weakref.ref(stream)
        if self._cancelled:  # or else `cancel` finds the stream
            stream.cancelled.set()
        return _whole(stream, tell)

    def cancel(self) -> None:
        self._cancelled = True
        stream = self._stream()
        if stream is not None:
            stream.cancelled.set()


def _whole(stream: TextStream, tell: Tell) -> Reads[Any]:
    told = 0  # of the tokens' logprobs

    def hear(text: str, tokens: int) -> None:
        nonlocal told
        tell(Piece(text, stream.logprobs[told:tokens]))
        told = tokens

    try:
        result = yield from stream.whole(hear)
    except ConstraintError as error:
        if error.result.finish_reason != "length":
            raise
        result = error.result  # as far as it came, which its reason says
    return Ended(result, stream.logprobs[told:])


class Ticket:
    """What one request asks for, and what came of it. Made on the event loop that waits for it."""

    def __init__(
        self, jobs: Sequence[AnswerJob], adapter: str | None, seen: Callable[[Event], None]
    ) -> None:
        """`seen` is told of each event when it comes to the loop."""
        self.jobs, self.adapter, self._seen = list(jobs), adapter, seen
        self.cancelled = False
        self.begun = False
        self._next = 0  # of its jobs, the first that has no seat yet
        self._open = len(self.jobs)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(which of its jobs, what came) until all have ended. Raises what one failed with."""
        while self._open:
            index, event = await self._events.get()
            if isinstance(event, Ended):
                self._open -= 1
                if isinstance(event.outcome, Exception):
                    raise event.outcome
            yield index, event

    async def outcomes(self) -> list[Any]:
        """What came of each, in order."""
        found: list[Any] = [None] * len(self.jobs)
        async for index, event in self.events():
            if isinstance(event, Ended):
                found[index] = event.outcome
        return found

    def cancel(self) -> None:
        """Nobody waits for it any more; what runs of it ends before its next token."""
        self.cancelled = True
        for job in self.jobs:
            job.cancel()

    @property
    def more(self) -> bool:
        """Whether some of its jobs have no seat."""
        return self._next < len(self.jobs)

    def take(self) -> int:
        """On the worker's thread: the next of its jobs."""
        self.begun = True
        self._next += 1
        return self._next - 1

    def tell(self, index: int, event: Event) -> None:
        """On the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop ended, and with it whoever waited
            self._loop.call_soon_threadsafe(self._came, index, event)

    def _came(self, index: int, event: Event) -> None:
        self._seen(event)
        self._events.put_nowait((index, event))

    def give_up(self, error: Exception) -> None:
        """Ends all that has no seat."""
        while self.more:
            self.tell(self.take(), Ended(error))
