"""A training run, the same over both engines: steps, validation, saving, stopping, going on.

Design choices:
- A step is dispatched before the loss of the one before is read, so that the device never waits
  for the host; nothing is saved before every loss up to there is known to be finite.
- Ctrl-C is taken at the end of a step. The state is saved, and the message says how to go on.
- Everything that decides about the numbers is in the options, the data and the state, so a run
  that was killed and resumed ends bit for bit where an uninterrupted one does.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from gemma_multi.errors import TrainingError, TrainingStopped
from gemma_multi.training.batches import Batch, Batches
from gemma_multi.training.display import Display
from gemma_multi.training.history import History
from gemma_multi.training.options import TrainingOptions
from gemma_multi.training.state import (
    Position,
    read_state,
    read_step,
    remove_temporaries,
    save_state,
    write_tensors,
)
from gemma_multi.training.trainer import StepResult, Trainer

_NAMED_ROWS = 8  # in a message about a batch
_RATE_OVER = 20  # steps, for tokens a second


@dataclass
class Run:
    """Trains `trainer` on `batches`, validates on `validation`, and keeps all of it in
    `directory`: `state.safetensors`, `best-<step>.safetensors` and `history.jsonl`."""

    trainer: Trainer
    batches: Batches
    validation: Batches | None
    options: TrainingOptions
    directory: Path
    display: Display
    writer: Any = None  # TensorBoard's
    position: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        self.leads = self.trainer.rank == 0  # the others compute, and write nothing
        self.history = History(self.directory / "history.jsonl")
        self.counts = [self.batches.count(epoch) for epoch in range(self.options.epochs)]
        self.ends = list(accumulate(self.counts))  # the step each epoch ends with
        self.steps = self.ends[-1]
        self._pending: tuple[int, Batch, StepResult, float] | None = None
        self._recent: list[tuple[int, float]] = []
        self._clock = time.monotonic()

    @property
    def state_path(self) -> Path:
        return self.directory / "state.safetensors"

    def best_path(self, step: int) -> Path:
        return self.directory / f"best-{step}.safetensors"

    def resume(self) -> None:
        """Goes on from the saved state, if there is one."""
        if self.leads:
            remove_temporaries(self.directory)
        if self.state_path.exists():
            self.position, trained, optimizer = read_state(self.state_path)
            self.trainer.restore(trained, optimizer)
        self.history.resume(self.position.step if self.state_path.exists() else -1, self.leads)

    def train(self) -> None:
        """Raises TrainingError where the loss is not finite, TrainingStopped on Ctrl-C."""
        with _interruptible() as interrupted, self.display as display:
            display.start(self.position.step, self.steps)
            if self.position.validated is None:
                self._validate()
            self._saved_at = self._clock = time.monotonic()
            for step, batch in self._remaining():
                rate = self.options.rate(step, self.steps)
                result = self.trainer.step(batch, rate)
                self._settle()
                self._pending = (step + 1, batch, result, rate)
                self.position.step = step + 1
                if self._validation_due():
                    self._settle()
                    self._validate()
                if self.trainer.any_of(interrupted.is_set()):
                    self._settle()
                    self.save()
                    raise TrainingStopped(
                        f"stopped after step {step + 1} of {self.steps}; everything up to there "
                        f"is saved in {self.directory}. Go on with resume=True (--resume)"
                    )
                if time.monotonic() - self._saved_at >= self.options.save_every:
                    self._settle()
                    self.save()
            self._settle()
            self.save()

    def save(self) -> None:
        self._saved_at = time.monotonic()
        if not self.leads:
            return
        save_state(self.state_path, self.position, self.trainer.tensors(),
                   self.trainer.optimizer_state())  # fmt: skip
        for path in self.directory.glob("best-*.safetensors"):
            if path != self.best_path(self.position.best_step or 0):
                path.unlink()
        self._saved_at = time.monotonic()

    def _remaining(self) -> Iterator[tuple[int, Batch]]:
        """(step, its batch) from where the run stands."""
        for epoch, (end, count) in enumerate(zip(self.ends, self.counts, strict=True)):
            start = end - count
            first = max(0, self.position.step - start)
            if first < count:
                yield from enumerate(self.batches.epoch(epoch, first), start + first)

    def _settle(self) -> None:
        """Reads the result of the step that is on its way, and records it."""
        if self._pending is None:
            return
        step, batch, result, rate = self._pending
        self._pending = None
        loss = float(result.loss) / max(1, batch.loss_tokens)
        norm = float(result.gradient_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(step, batch, loss, norm)
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        self._recent = [*self._recent[1 - _RATE_OVER :], (batch.tokens, seconds)]
        tokens, spent = map(sum, zip(*self._recent, strict=True))
        self._record(step=step, loss=loss, learning_rate=rate, gradient_norm=norm,
                     tokens=batch.tokens, seconds=round(seconds, 4))  # fmt: skip
        self.display.step(step, loss, tokens / max(spent, 1e-9))
        if self.writer is not None:
            for name, value in (("loss", loss), ("learning_rate", rate), ("gradient_norm", norm)):
                self.writer.add_scalar(f"training/{name}", value, step)

    def _record(self, **record: Any) -> None:
        if self.leads:
            self.history.add(**record)

    def _refuse(self, step: int, batch: Batch, loss: float, norm: float) -> None:
        examples = self.batches.examples
        rows = [examples.where(i) for i in batch.examples[:_NAMED_ROWS]]
        more = len(batch.examples) - len(rows)
        listed = ", ".join(rows) + (f" and {more} more" if more else "")
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm}"
        kept = "No state was saved yet"
        if self.state_path.exists():
            kept = f"The state of step {read_step(self.state_path)} is intact"
        raise TrainingError(
            f"the {what} at step {step}, on rows {listed}. {kept}; a lower learning rate than "
            f"{self.options.learning_rate:g}, or a look at these rows, may help"
        )

    def _validation_due(self) -> bool:
        every, step = self.options.evaluate_every, self.position.step
        if step == self.steps:
            return True
        return step in self.ends if every is None else step % every == 0

    def _validate(self) -> None:
        if self.validation is None:
            return
        total, count = 0.0, 0
        for batch in self.validation.in_order():
            total += self.trainer.evaluate(batch)
            count += batch.loss_tokens
        loss, step, position = total / max(1, count), self.position.step, self.position
        position.validated = step
        if not math.isfinite(loss):
            raise TrainingError(
                f"the validation loss is {loss} after step {step}; is the model whole, or was the "
                "learning rate too high?"
            )
        if position.best_loss is None or loss < position.best_loss:
            position.best_step, position.best_loss = step, loss
            kept_anyway = step in (0, self.steps)  # the first is the base, the last is saved
            if self.leads and not kept_anyway:
                write_tensors(self.best_path(step), self.trainer.tensors())
        self._record(step=step, validation_loss=loss)
        self.display.say(f"step {step} of {self.steps}: validation loss {loss:.4f}")
        if self.writer is not None:
            self.writer.add_scalar("validation/loss", loss, step)
        self._clock = time.monotonic()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def handle(*_: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
