"""What a person sees while a model trains: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma_multi.terminal import notes

_LINE_EVERY = 30.0  # seconds, where there is no terminal


class Display:
    """Bar, loss, tokens a second and time left; silent when told so."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown
        self._bar = Progress(
            TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
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
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", rate=rate)
        if not notes.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self.say(f"step {step} of {self._steps}, loss {loss:.3f}, {rate}")

    def say(self, sentence: str) -> None:
        if self._shown:
            notes.print(sentence, markup=False)
