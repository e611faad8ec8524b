"""`batch`: a task over a file of rows."""

from __future__ import annotations

from typing import Any

import click

from gemma_multi.batch.options import BatchOptions, RayOptions
from gemma_multi.cli.common import (
    described_routes,
    field_options,
    given,
    json_list,
    place_options,
    print_json,
    read_file_or_text,
    taken_place,
)
from gemma_multi.constraints import ConstraintOptions
from gemma_multi.sampling import GenerationOptions


@click.command()
@click.argument("model")
@click.argument("input")
@click.argument("output")
@click.option("--task", default="generate", show_default=True,
              help="generate, classify, route, extract or embed.")  # fmt: skip
@field_options(BatchOptions)
@field_options(RayOptions)
@click.option("--instruction", help="What the model is told in front of each text.")
@click.option("--raw", is_flag=True, default=None, help="Prompts as plain text, for base models.")
@click.option("-l", "--label", "labels", multiple=True,
              help="classify: what a text may be; given once for each.")  # fmt: skip
@click.option("-r", "--route", "routes", multiple=True, metavar="NAME=DESCRIPTION",
              help="route: where a row may go; given once for each.")  # fmt: skip
@click.option("--calibrate", is_flag=True, default=None,
              help="classify, route: divide by what each would get without a text.")  # fmt: skip
@click.option("--examples", metavar="FILE",
              help="classify, route, extract: a JSON list of [text, answer].")  # fmt: skip
@click.option("--pooling", help="embed: last or mean.  [last]")
@click.option("--tools", metavar="FILE", help="generate: functions to call, a list in JSON.")
@click.option("--tool-choice", help="auto, required, none or a function's name.  [auto]")
@field_options(GenerationOptions, leave_out=("seed", "logprobs"))
@field_options(ConstraintOptions)
@click.option("--adapter", help="Directory of a LoRA adapter (PEFT's layout).")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@place_options
def batch(
    model: str, input: str, output: str, task: str, as_json: bool, adapter: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Ask MODEL every row of INPUT and write the answers to OUTPUT.

    Both are .jsonl, .csv or .parquet files. An answer stands in the order of its row, with the
    row's number from 0 or its --key. Rows that fail go to a file beside OUTPUT with what was wrong
    with each, and the exit status is 1.

    What is done is kept in OUTPUT.parts until all of it is: after Ctrl-C or a kill, the same
    command with --resume goes on, and the output has the same bytes. Nothing that is there is
    replaced without --overwrite.
    """
    from gemma_multi.batch import run

    place = taken_place(options)
    told = given(options)
    for name in ("schema", "grammar"):
        if name in told:
            told[name] = read_file_or_text(told[name])
    for name in ("tools", "examples"):
        if name in told:
            told[name] = json_list(name, told[name])
    if "routes" in told:
        told["routes"] = described_routes(told["routes"])
    report = run(
        model, input, output, task, load={"adapter": adapter, **place},
        progress=place["progress"], **told,
    )  # fmt: skip
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(str(report))
    if report.failed:
        raise click.exceptions.Exit(1)
