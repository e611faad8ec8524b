"""Where sessions on Keras keep their keys and values: in a row of a table, alone or side by side.

Design choices:
- XLA compiles for fixed shapes, so a table has one of a few numbers of rows and of positions, and
  grows from one number of positions to the next.
- A session alone has a table of one row, and forks of it look at the same until one reads on.
- Sessions that are read together lie in one table, and stay there: each step of all of them writes
  in place. A seat whose session is gone, or sits elsewhere by now, is free for another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma_multi.engines.caches import MOST_TOGETHER
from gemma_multi.engines.keras_decoder import Cache, cache_positions

if TYPE_CHECKING:
    from gemma_multi.engines.keras import KerasEngine, KerasSession

_ROWS = (2, 8, 32, MOST_TOGETHER)  # of a table for many
_ALONE = (512, 2048, 8192)  # positions of a session alone; past these, multiples of the last
# side by side memory counts more than the time to compile
_TOGETHER = (128, 256, 512, 1024, 2048, 4096, 8192)


class Table:
    """Caches of `rows` sessions for `capacity` positions each, layer by layer."""

    def __init__(self, engine: KerasEngine, rows: int, layers: list[Cache], capacity: int) -> None:
        self._engine, self.rows, self.layers, self.capacity = engine, rows, layers, capacity
        self._seats: list[weakref.ref[KerasSession] | None] = [None] * rows
        # forks that look at the only row of it
        self.users: weakref.WeakSet[KerasSession] = weakref.WeakSet()

    @classmethod
    def empty(cls, engine: KerasEngine, rows: int, positions: int) -> Table:
        """Of zeros, for at least so many positions."""
        capacity, config = _capacity(rows, positions), engine.config
        zeros, width = engine.runtime.zeros, (config.num_key_value_heads, config.head_dim)
        layers = []
        for i in range(config.num_hidden_layers):
            shape = (rows, cache_positions(config, i, capacity), *width)
            layers.append((zeros(shape, engine.compute), zeros(shape, engine.compute)))
        return cls(engine, rows, layers, capacity)

    def reserve(self, positions: int) -> None:
        """Makes each row hold at least so many positions."""
        if positions <= self.capacity:
            return
        capacity = _capacity(self.rows, positions)
        self.layers = self._padded(self.layers, capacity)
        self.capacity = capacity

    def _padded(self, layers: list[Cache], capacity: int) -> list[Cache]:
        """Layers of fewer positions with zeros behind: no ring has turned while it had as many
        positions as a global layer."""
        pad, config, padded = self._engine.runtime.pad_positions, self._engine.config, []
        for i, (keys, values) in enumerate(layers):
            more = cache_positions(config, i, capacity) - keys.shape[1]
            padded.append((pad(keys, more), pad(values, more)) if more else (keys, values))
        return padded

    def copy(self) -> Table:
        duplicate = self._engine.runtime.copy
        layers = [(duplicate(keys), duplicate(values)) for keys, values in self.layers]
        return Table(self._engine, self.rows, layers, self.capacity)

    def row(self, row: int) -> Table:
        """A table of its own for the session of one row."""
        alone = Table(self._engine, 1, self.row_layers(row), self.capacity)
        alone.reserve(_capacity(1, self.capacity))
        return alone

    def row_layers(self, row: int) -> list[Cache]:
        """`[1, ...]` each."""
        if self.rows == 1:
            return self.layers
        taken: list[Cache] = self._engine.runtime.take_row(self.layers, row)
        return taken

    def sessions(self) -> dict[int, KerasSession]:
        """Who sits here, by row."""
        seated = {}
        for row, seat in enumerate(self._seats):
            session = seat() if seat is not None else None
            if session is not None and session.table is self and session.row == row:
                seated[row] = session
        return seated

    def seat(self, session: KerasSession) -> None:
        """Takes a session in, with all that it has read, on a seat that is free."""
        seated = self.sessions()
        row = next(row for row in range(self.rows) if row not in seated)
        before = session.table
        if before is None and self._seats[row] is not None:
            # what somebody left there is masked, but one that is not finite would spoil the sums
            before = Table.empty(self._engine, 1, 1)
        if before is not None:
            self.reserve(before.capacity if before.rows > 1 else session.written)
            given = self._fitted(before.row_layers(session.row))
            with self.giving_away():
                self.layers = self._engine.runtime.put_row(self.layers, given, row)
        self._seats[row] = weakref.ref(session)
        session.sit(self, row)

    @contextmanager
    def giving_away(self) -> Iterator[None]:
        """While the arrays are another call's: if that is interrupted, they are nobody's, and all
        who sit here are empty."""
        try:
            yield
        except BaseException:
            for session in self.sessions().values():
                session._forget()
            raise

    def _fitted(self, layers: list[Cache]) -> list[Cache]:
        """One row's layers with as many positions as this table has; those beyond hold nothing."""
        config = self._engine.config
        cut = []
        for i, (keys, values) in enumerate(layers):
            positions = cache_positions(config, i, self.capacity)
            cut.append((keys[:, :positions], values[:, :positions]))
        return self._padded(cut, self.capacity)


def seat_together(engine: KerasEngine, sessions: Sequence[KerasSession]) -> Table:
    """The table in which all of these sit by now, beside no more others than there must be."""
    needed = next(rows for rows in _ROWS if rows >= len(sessions))
    tables = {id(s.table): s.table for s in sessions if s.table is not None and s.table.rows > 1}
    best = max(
        (table for table in tables.values() if table.rows == needed),
        key=lambda table: sum(s.table is table for s in sessions), default=None,
    )  # fmt: skip
    if best is not None:
        seated = best.sessions().values()
        strangers = sum(s not in sessions for s in seated)
        if strangers + len(sessions) > best.rows:
            best = None  # they may be read together with others yet
    if best is None:
        best = Table.empty(engine, needed, max(session.length for session in sessions))
    for session in sessions:
        if session.table is not best:
            best.seat(session)
    return best


def _capacity(rows: int, positions: int) -> int:
    sizes = _ALONE if rows == 1 else _TOGETHER
    step = sizes[-1]
    return next((size for size in sizes if size >= positions), -(-positions // step) * step)
