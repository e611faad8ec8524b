"""`ship`, `finetune`, `data check` and `merge`: from rows to a specialist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_multi.cli.common import (
    field_options,
    given,
    output_option,
    print_json,
    source_options,
)
from gemma_multi.errors import OptionError
from gemma_multi.training.options import TrainingOptions


@click.command()
@click.argument("model")
@click.argument("rows", type=click.Path(path_type=Path))
@output_option("A new directory, or one where a `ship` was stopped: it goes on there.")
@click.option("-b", "--backend", default="auto", show_default=True, help="keras, mlx or auto.")
@click.option(
    "--validation",
    metavar="SHARE|FILE",
    help="The share of rows to hold out, or rows of their own.  [0.2, at most 200 rows]",
)
@click.option(
    "--score",
    default="auto",
    show_default=True,
    help="labels, fields (of JSON), exact, loss, or auto: what suits the rows.",
)
@click.option("--context-length", type=int, help="Of the file.  [1024, or what the rows need]")
@field_options(
    TrainingOptions,
    leave_out=["validation"],
    unset={
        "method": "scales for an original, which is calibrated first, else as for finetune",
        "epochs": "15 of few rows, 1 of many",
        "schedule": "cosine",
        "batch_size": "4 or 8",
        "max_length": "what the rows need",
        "learning_rate": "by method, and 2e-3 for small models",
    },
)
@source_options
@click.option("--json", "as_json", is_flag=True, help="What report.json holds.")
def ship(
    model: str, rows: Path, output: str, validation: str | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Make a specialist of MODEL from ROWS (.jsonl, .csv or .parquet), for phones.

    Trains, exports a .litertlm, runs that file, asks held-out rows before and after, and writes
    report.html. Training options are chosen by the model and the number of rows where unset. The
    exit status is 1 where the file does not compute what was trained.
    """
    from rich.console import Console

    from gemma_multi.shipping import ship as run

    held = None if validation is None else _validation(validation)
    report = run(model, rows, output, validation=held, **given(options))
    if as_json:
        print_json(report.to_dict())
    else:
        Console(highlight=False).print(report.to_table())
    if not report.passed:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path))
@output_option("A new directory for the model, its history and its curves.")
@click.option("-b", "--backend", default="auto", show_default=True, help="keras, mlx or auto.")
@click.option("--validation", default="0.1", show_default=True, metavar="SHARE|FILE",
              help="The share of rows to hold out, or rows of their own.")  # fmt: skip
@click.option("--devices", type=int, help="Of JAX, to share each batch.")
@click.option("--resume", is_flag=True, help="Go on where a run in the output was stopped.")
@click.option("--tensorboard", is_flag=True, help="Also write events for TensorBoard.")
@field_options(TrainingOptions, leave_out=["validation"])
@source_options
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
def finetune(
    model: str, data: Path, output: str, validation: str, as_json: bool, **options: Any
) -> None:
    """Train MODEL on DATA (.jsonl, .csv or .parquet).

    Writes a model through the int4 grid unless told --no-qat; with --method lora an adapter.
    """
    from gemma_multi.training.finetune import finetune as run

    result = run(model, data, output, validation=_validation(validation), **given(options))
    if as_json:
        best = str(result.path(best=True)) if result.best_step else None
        print_json({
            "path": str(result.path()), "best_path": best,
            "best_step": result.best_step, "best_loss": result.best_loss, "loss": result.loss,
            "verdict": result.verdict, "curves": str(result.output / "curves.png"),
        })  # fmt: skip
    else:
        click.echo(result)


def _validation(given: str) -> float | Path:
    try:
        return float(given)
    except ValueError:
        return Path(given)


@click.group()
def data() -> None:
    """Look at training data."""


@data.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-m", "--model", default="storyteller", show_default=True, help="Whose tokens.")
@click.option("--validation", type=click.Path(path_type=Path), help="Rows that should differ.")
@click.option("--max-length", type=int, default=512, show_default=True, help="In tokens.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def check(
    file: Path, model: str, validation: Path | None, max_length: int, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Say what FILE holds: rows, roles, lengths, duplicates, and what is wrong with it.

    The exit status is 1 where training could not begin.
    """
    from gemma_multi.sources import open_checkpoint
    from gemma_multi.terminal import notes
    from gemma_multi.training.check import check_data
    from gemma_multi.training.check_view import show

    tokenizer = open_checkpoint(model, **given(options)).tokenizer
    with notes.status(f"reading {file.name}") as status:
        report = check_data(
            file, tokenizer, validation=validation, max_length=max_length,
            progress=lambda rows: status.update(f"reading {file.name}: {rows:,} rows"),
        )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        show(report)
    if not report.ok:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("model")
@click.argument("adapter", type=click.Path(path_type=Path))
@output_option("A new directory.")
@click.option("--bits", type=int, help="4 or 8 puts a dense MODEL on the grid.")
@source_options
def merge(model: str, adapter: Path, output: str, bits: int | None, **options: Any) -> None:
    """Write MODEL with the LoRA ADAPTER in it."""
    from gemma_multi.exporters import save
    from gemma_multi.files import check_output
    from gemma_multi.formats.peft import read_adapter
    from gemma_multi.sources import open_checkpoint
    from gemma_multi.terminal import notes
    from gemma_multi.transforms import cast_to_stored, to_precision
    from gemma_multi.transforms import merge as run

    if bits not in (None, 4, 8):
        raise OptionError(f"bits is {bits}, expected 4 or 8")
    check_output(Path(output), directory=True)
    base = open_checkpoint(model, **given(options))
    with notes.status("merging"):
        merged = run(base, read_adapter(adapter, base.config))
        save(cast_to_stored(merged, base) if bits is None else to_precision(merged, f"int{bits}"),
             output)  # fmt: skip
    click.echo(output)
