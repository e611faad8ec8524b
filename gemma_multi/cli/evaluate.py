"""`eval`: how good is it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import (
    field_options,
    given,
    place_options,
    print_json,
    read_file_or_text,
    taken_place,
)
from gemma_multi.errors import OptionError
from gemma_multi.evaluation.run_harness import HarnessOptions
from gemma_multi.evaluation.tasks import tasks

if TYPE_CHECKING:
    from gemma_multi.evaluation import EvaluationReport
    from gemma_multi.model import Model


@click.command("eval")
@click.argument("model")
@click.option("--task", help=f"{', '.join(tasks())}.")
@click.option("--data", type=click.Path(path_type=Path),
              help="Rows with answers: .jsonl, .csv or .parquet.")  # fmt: skip
@click.option("--harness", metavar="TASKS",
              help="Tasks of EleutherAI's harness instead, separated by commas.")  # fmt: skip
@field_options({**{one.name: one.options for one in tasks().values()}, "harness": HarnessOptions})
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page.")
@click.option("--record", is_flag=True, help="Also add it to the card of MODEL, a directory.")
@click.option("--adapter", help="Directory of a LoRA adapter (PEFT's layout).")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@place_options
def evaluate(
    model: str, task: str | None, data: Path | None, harness: str | None, html: Path | None,
    record: bool, as_json: bool, adapter: str | None, **options: Any,
) -> None:  # fmt: skip
    """Ask MODEL rows whose answers are known, and count what is right.

    Figures come with 95% intervals, by class where there are classes.
    """
    from rich.console import Console

    from gemma_multi import load
    from gemma_multi.evaluation.record import check_recordable
    from gemma_multi.pages import check_page

    if (task is None) is (harness is None):
        raise OptionError(f"give --task ({', '.join(tasks())}) or --harness TASKS")
    if harness is not None and (data is not None or html is not None):
        raise OptionError("tasks of the harness bring their own data, and have no page")
    if html is not None:
        check_page(html)
    if record:
        check_recordable(model)
        if adapter is not None:
            raise OptionError("the card is of the directory's own weights: `merge` the adapter "
                              "into a directory and record what that scores")  # fmt: skip
    place, told = taken_place(options), given(options)
    if "schema" in told:
        told["schema"] = read_file_or_text(told["schema"])
    reports = _asking(task, data, harness, told)(
        load(model, adapter=adapter, **place), place["progress"]
    )  # fmt: skip
    for report in reports:
        if not as_json:
            Console(highlight=False).print(report.to_table())
        if html is not None:
            report.save(html)
        if record:
            report.record(model)
    if as_json:
        facts = [report.to_dict() for report in reports]
        print_json(facts if harness is not None else facts[0])


def _asking(
    task: str | None, data: Path | None, harness: str | None, options: dict[str, Any]
) -> Callable[[Model, bool], list[EvaluationReport]]:
    """What asks a loaded model; its options are checked before one is loaded."""
    from gemma_multi.evaluation import check, evaluate
    from gemma_multi.evaluation.run_harness import run_harness
    from gemma_multi.options import checked

    if harness is not None:
        names = [name.strip() for name in harness.split(",")]
        checked(HarnessOptions, options, "the harness")
        return lambda model, progress: run_harness(model, names, progress=progress, **options)
    assert task is not None
    check(data, task, options)
    return lambda model, progress: [evaluate(model, data, task, progress=progress, **options)]
