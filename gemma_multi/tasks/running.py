"""Tasks over several texts: side by side where an engine gains by it, else one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_multi.errors import GemmaError
from gemma_multi.progress import Progress, reporting
from gemma_multi.reads import Reads, complete, complete_together

if TYPE_CHECKING:
    from gemma_multi.model import Model

T = TypeVar("T")


def run_all(
    model: Model, jobs: Sequence[Reads[Any]], single: bool, label: str, progress: Progress
) -> Any:
    """What came of each, in order, or of the only one. Raises what the first that failed raised."""
    with reporting(progress, label) as report:
        if single:
            return complete(jobs[0])
        found: list[Any] = [None] * len(jobs)
        starts = map(_start, jobs)
        for done, (place, outcome) in enumerate(
            complete_together(model.engine, starts, model.engine.rows_at_a_time)
        ):
            if isinstance(outcome, GemmaError):
                raise outcome
            found[place] = outcome
            report(done + 1, len(jobs))
    return found


def _start(job: Reads[T]) -> Callable[[], Reads[T]]:
    return lambda: job
