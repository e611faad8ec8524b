"""Worker: the one thread that owns a model, and answers many requests side by side.

Design choices:
- A worker runs `reads.SideBySide`, which batch and the tasks run as well. Between two reads of it,
  newcomers take the seats that are free and those that were cancelled end, so a request waits for
  one read and not for another's answer, and one that nobody waits for costs one token at most.
- Requests are taken in the order they came, one answer of each in turn: one that asks for many
  answers does not keep others waiting.
- The model is loaded on the worker's thread, and nothing else touches the engine: some frameworks
  bind what they hold to a thread.
- An engine holds one adapter at a time. The oldest that waits decides which: while it waits for
  another one than the active, nobody is let past it, what runs ends, and then all that wait for
  its adapter may come.
- What comes of answers goes to the event loop that asked, piece by piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gemma_multi.errors import ConstraintError, GemmaError
from gemma_multi.generation import TokenLogprobs
from gemma_multi.model import Model
from gemma_multi.reads import Reads, SideBySide
from gemma_multi.streaming import TextStream

log = logging.getLogger("gemma_multi.serving")


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


class Job(Protocol):
    """One answer that is asked for."""

    def begin(self, model: Model, tell: Tell) -> Reads[Any]:
        """Its reads, on the worker's thread. Raises GemmaError for what cannot be answered."""

    def cancel(self) -> None:
        """From any thread: ends it as soon as can be."""


class Generation:
    """A Job: a text, as `Model.stream` gives it."""

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
        self, jobs: Sequence[Job], adapter: str | None, seen: Callable[[Event], None]
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


class Full(Exception):
    """The queue has no room for another request."""


class Cancelled(Exception):
    """A request ended before its answer began."""


Seat = tuple[Ticket, int]


class Worker:
    """A thread, its model and a queue."""

    def __init__(self, load: Callable[[], Model], seats: int | None, queue: int) -> None:
        """`seats` answers run side by side, as many as suit the engine if None; `queue` requests
        may wait for one. Raises what `load` raises."""
        self.queue = queue
        self._load, self._seats = load, seats
        self._waiting: deque[Ticket] = deque()
        self._running: SideBySide[Seat, Any] | None = None
        self._changed = threading.Condition()  # of what waits, and of:
        self._closing = False
        self._failed: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gemma-multi-worker", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def waiting(self) -> int:
        """Requests that have no seat."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that have one."""
        return len(self._running or ())

    @property
    def seats(self) -> int:
        assert self._seats is not None
        return self._seats

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, ticket: Ticket) -> None:
        """Puts a request in the queue. Raises Full."""
        with self._changed:
            if len(self._waiting) >= self.queue:
                self._drop_cancelled()
            if len(self._waiting) >= self.queue or self._closing:
                raise Full
            self._waiting.append(ticket)
            self._changed.notify()

    def close(self) -> None:
        """Finishes what runs and waits, and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.model = self._load()
            if self._seats is None:
                self._seats = seats_for(self.model)
        except BaseException as error:
            self._failed = error
            return
        finally:
            self._ready.set()
        running = self._running = self._empty()
        while True:
            with self._changed:
                while not (running or self._waiting or self._closing):
                    self._changed.wait()
                if self._closing and not running and not self._waiting:
                    return
                arrived, switched = self._admit(len(running))
            if switched:
                try:
                    self.model.switch_adapter(arrived[0][0].adapter)
                except Exception as error:
                    self._end(arrived, error)
                    continue
                running = self._running = self._empty()
            for seat in arrived:
                self._begin(running, seat)
            try:
                if running:
                    running.read()
            except Exception as error:  # nobody knows what its sessions hold now
                self._end(running.keys(), error)
                running = self._running = self._empty()
            for (ticket, index), outcome in running.done():
                ticket.tell(index, outcome if isinstance(outcome, Ended) else Ended(outcome))

    def _empty(self) -> SideBySide[Seat, Any]:
        """On the engine that the model has now."""
        return SideBySide(self.model.engine)

    def _begin(self, running: SideBySide[Seat, Any], seat: Seat) -> None:
        ticket, index = seat
        job = ticket.jobs[index]
        try:
            running.join(
                seat, lambda: job.begin(self.model, lambda event: ticket.tell(index, event))
            )
        except Exception as error:
            self._end([seat], error)

    def _end(self, seats: Sequence[Seat], error: Exception) -> None:
        if not isinstance(error, GemmaError):
            log.error("a request failed", exc_info=error)
        for ticket, index in seats:
            ticket.tell(index, Ended(error))

    def _admit(self, running: int) -> tuple[list[Seat], bool]:
        """Who takes the free seats, and whether the adapter has to be switched for them first."""
        self._drop_cancelled()
        idle = not running and bool(self._waiting)
        adapter = self._waiting[0].adapter if idle else self.model.active_adapter
        found: list[Seat] = []
        passed: list[Ticket] = []  # over, for they wait for another adapter
        while self._waiting and running + len(found) < self.seats:
            ticket = self._waiting.popleft()
            if ticket.adapter != adapter:
                passed.append(ticket)
                if not idle:
                    break
                continue
            found.append((ticket, ticket.take()))
            if ticket.more:
                self._waiting.append(ticket)  # behind the others
        self._waiting.extendleft(reversed(passed))
        return found, bool(found) and adapter != self.model.active_adapter

    def _drop_cancelled(self) -> None:
        for ticket in self._waiting:
            if ticket.cancelled:
                ticket.give_up(Cancelled())
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.cancelled)


def seats_for(model: Model) -> int:
    """How many answers side by side suit an engine. One that does not batch answers no more of
    them by it, but everybody's first token comes sooner; each costs a conversation's caches."""
    return 32
