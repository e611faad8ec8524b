"""`evaluate`: how good a model is at a task, on rows with answers.

One call's way through this package: a task of `tasks` reads the rows, has them asked and counts
(`task` is what they share), `report` and `page` are what people read, and `record` keeps it in the
model's card. `harness` is the other way: EleutherAI's programs ask, and this package's engines
answer.
"""

from __future__ import annotations

import time
from typing import Any

from gemma_multi.errors import OptionError
from gemma_multi.evaluation.measured import place_of, weights_of, with_digest
from gemma_multi.evaluation.report import EvaluationReport
from gemma_multi.evaluation.task import Task
from gemma_multi.evaluation.tasks import tasks
from gemma_multi.loading import load
from gemma_multi.model import Model
from gemma_multi.options import checked
from gemma_multi.progress import Progress
from gemma_multi.rows import Data, data_name
from gemma_multi.sources import Source

__all__ = ["EvaluationReport", "evaluate"]


def evaluate(
    model: Source,
    data: Data | None,
    task: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **options: Any,
) -> EvaluationReport:
    """Asks `model` every row of `data` and counts what is right.

    model, revision, local_files_only: a loaded Model, for another backend or precision, or what
        `load` takes, which is then loaded as `load` does by itself.
    data: a file (.jsonl, .csv or .parquet) or rows, of the kind that the task takes; None for
        ifeval's dozen prompts that come along.
    task: "classify", "extract", "calls", "perplexity" or "ifeval".
    progress: True for a bar on a terminal, False for none, or a function of (done, total) rows.
    options: the task's own: `limit` for all; `instruction` and `raw` of those that ask a text;
        `labels`, `calibrate` and `free` of classify; `schema` of extract; `tool_choice` of calls;
        `loss_on` of perplexity; `max_tokens` of an answer.

    Raises OptionError for an unknown task or an option that it does not have, DataError naming the
    row that cannot be asked, BackendError for what is not installed, and what `load` raises.
    """
    started = time.perf_counter()
    chosen, rows, its = check(data, task, options)
    rows, digest = with_digest(rows)
    if not isinstance(model, Model) or revision is not None:
        model = load(model, revision=revision, local_files_only=local_files_only, progress=progress)
    found = chosen.run(model, rows, its, progress)
    return EvaluationReport(
        task=task, model=weights_of(model.checkpoint),
        data={"name": data_name(rows), "sha256": digest, "rows": found.count},
        protocol={**found.protocol, **place_of(model)},
        findings=found, seconds=time.perf_counter() - started,
    )  # fmt: skip


def check(data: Data | None, task: str, options: dict[str, Any]) -> tuple[Task, Data, Any]:
    """A task by name, its data and its options. Raises OptionError."""
    if task not in tasks():
        raise OptionError(f"task is {task!r}, expected one of {', '.join(tasks())}")
    chosen = tasks()[task]
    its = checked(chosen.options, options, f"task {task!r}")
    data = chosen.data if data is None else data
    if data is None:
        raise OptionError(f"task {task!r} needs data: rows with {chosen.rows}")
    return chosen, data, its
