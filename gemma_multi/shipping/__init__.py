"""`ship`: a model and some rows in; a file for phones and a page that says how good it is out.

One call's way through this package: `held_out` checks the rows and holds some out, `plan` decides
how to train, `stages` are the way from there (over `asking`, and `phone` for the file itself) which
`journal` goes through and remembers, `report` and `page` are what people read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_multi.errors import GemmaError, TrainingError, TrainingStopped
from gemma_multi.files import locked, write_atomically
from gemma_multi.pages import write_page
from gemma_multi.progress import Progress, check_progress
from gemma_multi.rows import Data
from gemma_multi.shipping.held_out import split_rows
from gemma_multi.shipping.journal import Journal
from gemma_multi.shipping.page import page
from gemma_multi.shipping.plan import check_room, plan
from gemma_multi.shipping.report import FACTS, PAGE, ShipReport, report_of
from gemma_multi.shipping.stages import Shipment
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.training.finetune import choose_trainer
from gemma_multi.transforms import original

__all__ = ["ShipReport", "ship"]

_LOCK_FILE = ".ship.lock"


def ship(
    model: Source,
    rows: Data,
    output: str | Path,
    *,
    validation: float | Data | None = None,
    score: str = "auto",
    backend: str = "auto",
    context_length: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **options: Any,
) -> ShipReport:
    """Trains `model` on `rows`, exports it for phones, runs that very file, and measures what it
    was worth, all in the directory `output`.

    model, revision, local_files_only: what to train; see `open_checkpoint`.
    rows: what to learn, and to be asked: as `finetune` takes them, 10 or more.
    output: a new directory, or one where `ship` was stopped or killed: it goes on there, and what
        has changed since (rows, options, the model) is done anew, with all that follows from it.
    validation: the share of rows to hold out, or rows of their own; a fifth, at most 200, if None.
    score: "labels", "fields" (of JSON), "exact" or "loss"; "auto" looks at the rows, and says why.
    backend: "keras", "mlx" or "auto", to train on and to ask in float.
    context_length: positions that the file can hold; 1,024 or what the rows need if None.
    progress: True for lines and bars on a terminal, False for none, or a function of (done, total)
        stages.
    options: `finetune`'s, over defaults that suit the model and the number of rows.

    Writes `model.litertlm`, `report.html`, `report.json`, `model/` (int4), `training/`, `rows/`,
    `answers/` and `ship.json`.

    Raises DataError for rows that are bad, too few, all alike or leaked, OptionError, BackendError
    or CheckpointError before anything is trained; TrainingError where the disk is full;
    TrainingStopped on Ctrl-C.
    """
    output = Path(output)
    check_progress(progress)
    Journal.check(output)
    split = split_rows(rows, validation, score, options.get("seed", 0))
    base = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    if not base.is_int4:
        base = original(base)
    chosen = plan(base, split, options, context_length)
    backend = choose_trainer(backend)
    check_room(base, chosen, output)
    with _alone_in(output) as journal:
        inner = progress if isinstance(progress, bool) else False
        shipment = Shipment(base, split, chosen, backend, journal, inner)
        stages = shipment.stages()
        count = len(stages) + 1
        say = _teller(progress, count)
        journal.pass_through(stages, say)
        say(len(stages), "write the report", "begins")
        report = report_of(shipment)
        write_page(page(report), output / PAGE)
        facts = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
        write_atomically(output / FACTS, facts.encode(errors="replace") + b"\n")
        if callable(progress):
            progress(count, count)
    return report


def _teller(progress: Progress, count: int) -> Any:
    """What tells people which stage it is."""

    def say(i: int, title: str, how: str) -> None:
        if callable(progress):
            progress(i, count)
        elif progress:
            from gemma_multi.terminal import notes

            more = {"begins": "", "goes on": ", going on where it was", "was done": ": done before"}
            notes.print(f"[{i + 1}/{count}] {title}{more[how]}", markup=False)

    return say


@contextmanager
def _alone_in(output: Path) -> Iterator[Journal]:
    """Holds the directory against a second `ship`, and says how to go on after what stops it."""
    again = f"what is done is kept in {output}, and the same command goes on from there"
    busy = f"{output}: another process ships there; wait for it, or choose another output"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output / _LOCK_FILE, busy):
            yield Journal(output)
    except (KeyboardInterrupt, TrainingStopped):
        raise TrainingStopped(f"stopped; {again}") from None
    except (OSError, GemmaError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):  # nothing that room on the disk would mend
            raise
        raise TrainingError(
            f"{output}: cannot be written: {cause.strerror or cause}; make room: {again}"
        ) from error
