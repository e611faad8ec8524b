"""Worker: the one thread that owns a model, and answers many requests side by side.

Design choices:
- A worker runs `reads.Driver`, which batch and the tasks run as well. Between two reads of it,
  newcomers take the seats that are free and those that were cancelled end, so a request waits for
  one read and not for another's answer, and one that nobody waits for costs one token at most.
- Requests are taken in the order they came, one answer of each in turn: one that asks for many
  answers does not keep others waiting.
- The model is loaded on the worker's thread, and nothing else touches the engine: some frameworks
  bind what they hold to a thread.
- An engine holds one adapter at a time. The oldest that waits decides which: while it waits for
  another one than the active, nobody is let past it, what runs ends, and then all that wait for
  its adapter may come.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gemma_multi.errors import GemmaError
from gemma_multi.model import Model
from gemma_multi.reads import Driver
from gemma_multi.serving.tickets import Ended, Ticket

log = logging.getLogger("gemma_multi.serving")


class Full(Exception):
    """The queue has no room for another request."""


class Cancelled(Exception):
    """A request ended before its answer began."""


Seat = tuple[Ticket, int]


class Worker:
    """A thread, its model and a queue."""

    def __init__(self, load: Callable[[], Model], seats: int, queue: int) -> None:
        """`seats` answers run side by side, and `queue` requests may wait for one. Raises what
        `load` raises."""
        self.seats, self.queue = seats, queue
        self._load = load
        self._waiting: deque[Ticket] = deque()
        self._running: Driver[Seat, Any] | None = None
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

    def _empty(self) -> Driver[Seat, Any]:
        """On the engine that the model has now."""
        return Driver(self.model.engine)

    def _begin(self, running: Driver[Seat, Any], seat: Seat) -> None:
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
