"""batch: a task over rows without end, in order, with an error for a row that fails.

Design choices:
- Options, constraints, seeds and adapters belong to a row, wherever it is read: a row may bring
  options of its own, and what they ask for is made for it.
- An engine holds one adapter at a time, so rows with the same one are run together, as far ahead
  as `_AHEAD` allows; results wait for those in front of them.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_multi.engines.caches import MOST_TOGETHER
from gemma_multi.errors import GemmaError, OptionError
from gemma_multi.generation import GenerationResult
from gemma_multi.progress import Progress, check_progress, reporting
from gemma_multi.reads import Reads, complete_together
from gemma_multi.tasks.classification import by_labels
from gemma_multi.tasks.embedding import by_pooling
from gemma_multi.tasks.extraction import by_schema
from gemma_multi.tasks.routing import by_routes
from gemma_multi.tools import read_tools

if TYPE_CHECKING:
    from gemma_multi.model import Model

_AHEAD = 32  # rows that may be read or done before the first one that is not, times the width
Job = Callable[[], Reads[Any]]


@dataclass(frozen=True)
class BatchRow:
    """What came of one row: a value, or the error that it ended with."""

    index: int  # of the row, from 0
    value: Any = None  # what the task gives for one text
    error: GemmaError | None = None


def batch(
    model: Model, items: Iterable[Any], task: str = "generate", *, width: int | None = None,
    progress: Progress = True, **options: Any,
) -> Iterator[BatchRow]:  # fmt: skip
    """See `Model.batch`."""
    check_progress(progress)
    if not isinstance(task, str) or task not in _TASKS:
        raise OptionError(f"task is {task!r}, expected one of {', '.join(_TASKS)}")
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise OptionError(f"items are {items!r}, expected a list or an iterator of rows")
    width = model.engine.rows_at_a_time if width is None else width
    if type(width) is not int or not 1 <= width <= MOST_TOGETHER:
        raise OptionError(f"width is {width!r}, expected a whole number 1 to {MOST_TOGETHER}")
    return _Run(model, items, task, options, width).run(progress)


class _Run:
    def __init__(
        self, model: Model, items: Iterable[Any], task: str, options: dict[str, Any], width: int
    ) -> None:
        self._model, self._task, self._options, self._width = model, task, options, width
        self._total = len(items) if isinstance(items, Sized) else 0
        self._at_start = model.active_adapter
        # by adapter, whose weights are in what is prepared; what is wrong for all is said now
        self._prepared = {self._at_start: _prepared(task, model, options)}
        self._source, self._exhausted = enumerate(items), False
        self._waiting: deque[_Waiting] = deque()  # for their adapter
        self._taken = 0  # rows of the source
        self._next = 0  # the first row that was not handed out

    def run(self, progress: Progress) -> Iterator[BatchRow]:
        model, done = self._model, {}
        with reporting(progress, self._task) as report:
            try:
                while self._waiting or not self._exhausted:
                    if self._waiting:
                        model.switch_adapter(self._waiting[0].adapter)
                    adapter = model.active_adapter
                    running: dict[int, int] = {}  # place among those that run -> row
                    jobs = self._jobs(running)
                    for place, outcome in complete_together(model.engine, jobs, self._width):
                        row = running.pop(place)
                        if isinstance(outcome, GemmaError):
                            done[row] = BatchRow(row, error=outcome)
                        else:
                            done[row] = BatchRow(row, outcome)
                        while self._next in done:
                            result = done.pop(self._next)
                            self._next += 1
                            report(self._next, self._total)
                            yield result
                            if model.active_adapter != adapter:
                                raise OptionError(
                                    f"the adapter was switched to {model.active_adapter!r} while "
                                    f"a batch was running with {adapter!r}; give it to the rows"
                                )
            finally:
                model.switch_adapter(self._at_start)

    def _jobs(self, running: dict[int, int]) -> Iterator[Job]:
        """Those whose adapter is active: what waits, then what comes."""
        adapter, before = self._model.active_adapter, self._waiting
        self._waiting, place = deque(), 0
        while (row := before.popleft() if before else self._read_next()) is not None:
            if row.adapter == adapter:
                running[place] = row.index
                place += 1
                yield row.job
            else:
                self._waiting.append(row)

    def _read_next(self) -> _Waiting | None:
        """The next row of the source; None where there is none, or too many are on their way."""
        if self._taken - self._next >= _AHEAD * self._width:
            return None
        index, item = next(self._source, (None, None))
        if index is None:
            self._exhausted = True
            return None
        self._taken += 1
        try:
            return _Waiting(index, *self._read(item))
        except GemmaError as error:
            return _Waiting(index, self._model.active_adapter, _failing(error))

    def _read(self, item: Any) -> tuple[str | None, Job]:
        """(the adapter a row asks for, its job). Raises GemmaError for a row that cannot be."""
        adapter, own = self._at_start, {}
        if isinstance(item, Mapping):
            own = dict(item)
            name = next((name for name in TEXTS if name in own), None)
            if name is None:
                raise OptionError(f"the row has {list(own)}, expected {' or '.join(TEXTS)}")
            item = own.pop(name)
            adapter = own.pop("adapter", adapter)
            if adapter is not None and (
                not isinstance(adapter, str) or adapter not in self._model.adapters
            ):
                known = ", ".join(map(repr, self._model.adapters)) or "none"
                raise OptionError(f"no adapter is called {adapter!r}; there are: {known}")
        return adapter, lambda: self._prepare(adapter, own)(item)

    def _prepare(self, adapter: str | None, own: dict[str, Any]) -> Callable[[Any], Reads[Any]]:
        """The task with a row's own options; when it runs, since that may ask the model."""
        if own:
            return _prepared(self._task, self._model, {**self._options, **own})
        if adapter not in self._prepared:
            self._prepared[adapter] = _prepared(self._task, self._model, self._options)
        return self._prepared[adapter]


@dataclass(frozen=True)
class _Waiting:
    """A row that was read from the source."""

    index: int
    adapter: str | None
    job: Job


TEXTS = ("prompt", "messages", "text", "query")  # what a row may call what it is about


def _prepared(task: str, model: Model, options: Mapping[str, Any]) -> Callable[[Any], Reads[Any]]:
    """A task that was given its options. Raises OptionError."""
    prepare = _TASKS[task]
    try:
        inspect.signature(prepare).bind(model, **options)
    except TypeError as error:
        raise OptionError(f"task {task!r}: {error}") from None
    return prepare(model, **options)


def _failing(error: GemmaError) -> Job:
    def job() -> Reads[Any]:
        raise error

    return job


def _generation(
    model: Model, *, raw: bool = False, tools: Any = None, tool_choice: str = "auto",
    **options: Any,
) -> Callable[[Any], Reads[GenerationResult]]:  # fmt: skip
    model.answer_options(options)
    if tools is not None:
        read_tools(tools)
    return lambda prompt: model.stream(
        prompt, raw=raw, tools=tools, tool_choice=tool_choice, **options
    ).whole()


# what is given options, and then one text after another
_TASKS: dict[str, Callable[..., Callable[[Any], Reads[Any]]]] = {
    "generate": _generation,
    "classify": by_labels,
    "route": by_routes,
    "extract": by_schema,
    "embed": by_pooling,
}
