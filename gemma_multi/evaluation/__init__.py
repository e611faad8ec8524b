"""`evaluate`: how good a model is at a task, on rows with answers.

One call's way through this package: a task of `tasks` reads the rows, has them asked and counts
(`task` is what they share), `report` and `page` are what people read, and `record` keeps it in the
model's card. `harness` is the other way: EleutherAI's programs ask, and this package's engines
answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from gemma_multi import __version__
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import DataError, OptionError
from gemma_multi.evaluation.report import EvaluationReport
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
    if task not in tasks():
        raise OptionError(f"task is {task!r}, expected one of {', '.join(tasks())}")
    chosen = tasks()[task]
    its = checked(chosen.options, options, f"task {task!r}")
    data = chosen.data if data is None else data
    if data is None:
        raise OptionError(f"task {task!r} needs data: rows with {chosen.rows}")
    data, digest = _with_digest(data)
    if not isinstance(model, Model) or revision is not None:
        model = load(model, revision=revision, local_files_only=local_files_only, progress=progress)
    found = chosen.run(model, data, its, progress)
    return EvaluationReport(
        task=task, model=weights_of(model.checkpoint),
        data={"name": data_name(data), "sha256": digest, "rows": found.count},
        protocol={**found.protocol, **place_of(model)},
        findings=found, seconds=time.perf_counter() - started,
    )  # fmt: skip


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which weights were measured."""
    origin = checkpoint.provenance
    return {"source": origin.source, "revision": origin.revision,
            "weights_sha256": checkpoint.digest()}  # fmt: skip


def place_of(model: Model) -> dict[str, Any]:
    """What they ran on."""
    facts = model.describe()
    names = ("backend", "device", "weights", "activations", "context_length", "adapter")
    return {
        **{name: facts[name] for name in names if name in facts},
        "package": f"gemma_multi {__version__}",
    }


def _with_digest(data: Data) -> tuple[Data, str]:
    """Data that can be read, and its SHA-256: of a file's bytes, else of the rows as JSON."""
    if isinstance(data, str | Path):
        path = Path(data)
        try:
            with path.open("rb") as file:
                return data, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if isinstance(data, dict) or not hasattr(data, "__iter__"):
        raise DataError(f"data is {type(data).__name__}, expected a file or rows")
    rows = list(data)
    plain = json.dumps(rows, sort_keys=True, default=str, ensure_ascii=False)
    return rows, hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()
