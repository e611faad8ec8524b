"""run_harness: tasks of EleutherAI's harness on a model of this package, as EvaluationReports."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_multi.errors import BackendError, DataError, OptionError
from gemma_multi.evaluation.measured import place_of, weights_of
from gemma_multi.evaluation.report import EvaluationReport
from gemma_multi.evaluation.task import Findings, TaskOptions
from gemma_multi.model import Model
from gemma_multi.options import checked, option
from gemma_multi.progress import Progress
from gemma_multi.scoring import Estimate, perplexity_score, share


@dataclass(frozen=True)
class HarnessOptions(TaskOptions):
    """What tasks of the harness can be told."""

    num_fewshot: int | None = option(None, "Examples in front of each row; the task's if unset.")
    include_path: str | None = option(None, "A directory with tasks of your own, as YAML.")
    chat: bool = option(False, "Ask in the model's conversation format.")


def run_harness(
    model: Model, names: Sequence[str], *, progress: Progress = True, **options: Any
) -> list[EvaluationReport]:
    """Runs tasks of lm_eval by name: a report for each. Their data come from the hub unless they
    are tasks of your own.

    options: `limit`, `num_fewshot`, `include_path`, `chat`.

    Raises BackendError where lm_eval is not installed, OptionError for a task that there is not,
    DataError where the data of one cannot be had.
    """
    its = checked(HarnessOptions, options, "the harness")
    try:
        from lm_eval import simple_evaluate

        from gemma_multi.evaluation.harness import GemmaMultiLM
    except ImportError:
        raise BackendError("the harness needs: pip install 'gemma-multi[eval]'") from None
    started = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = GemmaMultiLM(model, progress=progress)
    try:
        found = simple_evaluate(
            asked, tasks=list(names), task_manager=_manager(names, its.include_path),
            num_fewshot=its.num_fewshot, limit=its.limit, apply_chat_template=its.chat,
            batch_size=asked.batch_size,
        )  # fmt: skip
    except OSError as error:  # of the data: offline, not found
        raise DataError(f"the data of {', '.join(names)} cannot be had: {error}") from error
    seconds = time.perf_counter() - started
    return [_report(name, found, model, its, seconds) for name in found["samples"]]


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """What knows the tasks; lm_eval's own, which take a while to look through, where those of
    `include_path` are not enough."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise OptionError(f"include_path is {include_path!r}, and there is no such directory")
        ours = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(ours.all_tasks):
            return ours
    manager = TaskManager(include_path=include_path)
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise OptionError(f"lm_eval has no task {missing[0]!r}; `lm_eval ls tasks` lists them")
    return manager


def _report(
    name: str, found: Mapping[str, Any], model: Model, its: HarnessOptions, seconds: float
) -> EvaluationReport:
    from importlib.metadata import version

    samples = found["samples"][name]
    hashes = "".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples)
    config = found["configs"][name]
    count = len({one["doc_id"] for one in samples})
    protocol = {
        "prompt": f"lm_eval's {config['output_type']}"
                  f"{', as a conversation' if its.chat else ', as plain text'}",
        "num_fewshot": found["n-shot"].get(name, its.num_fewshot),
        "task_version": found["versions"].get(name),
        "harness": f"lm_eval {version('lm_eval')}", **place_of(model),
    }  # fmt: skip
    return EvaluationReport(
        name, weights_of(model.checkpoint),
        {"name": name, "sha256": hashlib.sha256(hashes.encode()).hexdigest(), "rows": count},
        protocol, _findings(found["results"][name], samples, count), seconds,
    )  # fmt: skip


def _findings(
    results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], count: int
) -> Findings:
    """The harness's metrics. A share of rows has Wilson's interval, a perplexity a bootstrap over
    rows, others what the harness's standard error makes; where it has none, there is none."""
    figures, numbers = {}, {}
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if filtered == "none" else f"{metric}, {filtered}"
        each = [one[metric] for one in samples if one["filter"] == filtered and metric in one]
        error = results.get(f"{metric}_stderr,{filtered}")
        if each and all(one in (0, 1) for one in each):
            figures[name] = share(round(sum(each)), len(each))
        elif metric.endswith("perplexity") and each and isinstance(each[0], tuple | list):
            losses, words = zip(*((-float(one[0]), int(one[1])) for one in each), strict=True)
            figures[name] = perplexity_score(losses, words).estimate
        elif isinstance(error, int | float):
            figures[name] = Estimate.of_error(value, error, count)
        else:
            numbers[name] = float(value)
    return Findings(figures, numbers=numbers, count=count)
