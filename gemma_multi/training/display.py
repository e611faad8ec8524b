"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress as rich_progress

from gemma_multi.progress import Progress, check_progress, silent
from gemma_multi.terminal import notes

_LINE_EVERY = 30.0  # seconds, where there is no terminal


class Display:
    """Bar, loss, tokens a second and time left; silent when told so."""

    def __init__(self, progress: Progress = True) -> None:
        check_progress(progress)
        self._report = progress if callable(progress) else silent
        self._shown = shown = progress is True
        text = rich_progress.TextColumn
        self._bar = rich_progress.Progress(
            text("training"), rich_progress.BarColumn(bar_width=None),
            rich_progress.MofNCompleteColumn(), text("loss {task.fields[loss]}"),
            text("{task.fields[rate]}"), rich_progress.TimeRemainingColumn(compact=True),
            console=notes, transient=True, disable=not (shown and notes.is_terminal), expand=True,
        )  # fmt: skip
        self._last_line = time.monotonic()

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """Yields a function that shows how far something has come."""
        if not (self._shown and notes.is_terminal):
            yield lambda _: None
            return
        with notes.status(what) as status:
            yield lambda count: status.update(f"{what}: {count:,}")

    def start(self, step: int, steps: int) -> None:
        self._task = self._bar.add_task("", total=steps, completed=step, loss="-", rate="")
        self._steps = steps

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        rate = f"{tokens_per_second:,.0f} tokens/s"
        self._report(step, self._steps)
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
        if not notes.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self.say(f"step {step} of {self._steps}, loss {loss:.3f}, {rate}")

    def say(self, sentence: str) -> None:
        if self._shown:
            notes.print(sentence, markup=False)
