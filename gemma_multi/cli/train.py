"""`finetune`, `data check` and `merge`: from rows to a specialist."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from gemma_multi.cli.common import print_json, source_options
from gemma_multi.errors import OptionError


def _training_options(command: Any) -> Any:
    """An option for each field of TrainingOptions; unset ones stay at their defaults."""
    from gemma_multi.training.options import TrainingOptions

    for field in reversed(dataclasses.fields(TrainingOptions)):
        kind = {"bool": bool, "int": int, "float": float}.get(str(field.type).split(" ")[0], str)
        name = "--" + field.name.replace("_", "-")
        if field.name == "validation":
            continue
        meaning = field.metadata["help"]
        if field.default is not None and field.name != "targets":
            meaning += f"  [{str(field.default).lower()}]"
        if kind is bool:
            name = f"{name}/--no-{name[2:]}"
        command = click.option(name, type=kind, default=None, help=meaning)(command)
    return command


@click.command()
@click.argument("model")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True,
              help="A new directory for the model, its history and its curves.")  # fmt: skip
@click.option("-b", "--backend", default="auto", show_default=True, help="keras, mlx or auto.")
@click.option("--validation", default="0.1", show_default=True, metavar="SHARE|FILE",
              help="The share of rows to hold out, or rows of their own.")  # fmt: skip
@click.option("--devices", type=int, help="Of JAX, to share each batch.")
@click.option("--resume", is_flag=True, help="Go on where a run in the output was stopped.")
@click.option("--tensorboard", is_flag=True, help="Also write events for TensorBoard.")
@_training_options
@source_options
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
def finetune(
    model: str, data: Path, validation: str, revision: str | None, local_files_only: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train MODEL on DATA (.jsonl, .csv or .parquet).

    Writes a model through the int4 grid unless told --no-qat; with --method lora an adapter.
    """
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.training.finetune import finetune as run

    given = {name: value for name, value in options.items() if value is not None}
    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    result = run(checkpoint, data, validation=_validation(validation), **given)
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
    file: Path, model: str, validation: Path | None, max_length: int, revision: str | None,
    local_files_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say what FILE holds: rows, roles, lengths, duplicates, and what is wrong with it.

    The exit status is 1 where training could not begin.
    """
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.terminal import notes
    from gemma_multi.training.check import check_data
    from gemma_multi.training.check_view import show

    tokenizer = resolve(model, revision=revision, local_files_only=local_files_only).tokenizer
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
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--bits", type=int, help="4 or 8 puts a dense MODEL on the grid.")
@source_options
def merge(
    model: str, adapter: Path, target: Path, bits: int | None, revision: str | None,
    local_files_only: bool,
) -> None:  # fmt: skip
    """Write MODEL with the LoRA ADAPTER in it as the directory TARGET."""
    from gemma_multi.checkpoint.adapter import Adapter
    from gemma_multi.checkpoint.checkpoint import ensure_free
    from gemma_multi.checkpoint.resolve import resolve
    from gemma_multi.terminal import notes

    if bits not in (None, 4, 8):
        raise OptionError(f"bits is {bits}, expected 4 or 8")
    ensure_free(target)
    checkpoint = resolve(model, revision=revision, local_files_only=local_files_only)
    with notes.status("merging"):
        Adapter.open(adapter, checkpoint.config).merge(checkpoint, bits).save(target)
    click.echo(target)
