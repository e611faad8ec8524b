"""Progress: what takes longer than two seconds says how far it is.

Every public verb takes `progress`: True shows a bar on a terminal's standard error (and nothing
elsewhere), False is silent, and a function is called with what is done and what there is in all,
0 where nobody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from gemma_multi.errors import OptionError

Report = Callable[[int, int], None]  # (done, total)
Progress = bool | Report


def silent(done: int, total: int) -> None:
    """A Report that says nothing."""


def check_progress(progress: Progress) -> None:
    """Raises OptionError for what is neither True, False nor a function."""
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(
            f"progress is {progress!r}, expected True, False, or a function of (done, total)"
        )


@contextmanager
def reporting(progress: Progress, label: str, unit: str = "") -> Iterator[Report]:
    """A function to report to, for the time of the block. `label` stands beside the bar; with a
    `unit`, how many are done and how many a second."""
    check_progress(progress)
    if progress is False:
        yield silent
    elif progress is True:
        with ExitStack() as bar:
            shown: list[Report] = []

            def report(done: int, total: int) -> None:
                if not shown:  # what has nothing to report imports nothing to report with
                    from gemma_multi.terminal import progress_bar

                    shown.append(bar.enter_context(progress_bar(label, unit)))
                shown[0](done, total)

            yield report
    else:
        yield progress
