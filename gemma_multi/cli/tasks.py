"""`classify`, `route` and `extract`: the tasks, for one text or for each line of many."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import (
    argument_or_piped,
    check_piped,
    described_routes,
    field_options,
    given,
    load_model,
    model_options,
    print_json,
    read_file_or_text,
)
from gemma_multi.errors import OptionError
from gemma_multi.sampling import GenerationOptions

if TYPE_CHECKING:
    from gemma_multi.tasks import Classification

_TASK = (
    click.option("--instruction", help="What the model is told in front of each text."),
    click.option("--raw", is_flag=True, help="Prompts as plain text, for base models."),
    click.option("--lines", is_flag=True, help="Each line that is piped in is a text of its own."),
    click.option("--json", "as_json", is_flag=True, help="Each answer as a JSON object on a line."),
)
_CALIBRATE = click.option(
    "--calibrate", is_flag=True, help="Divide by what each would get without a text."
)


def _task_options(command: Any) -> Any:
    for option in reversed(_TASK):
        command = option(command)
    return model_options(command)


@click.command()
@click.argument("text", required=False)
@click.option("-l", "--label", "labels", multiple=True, required=True,
              help="What the text may be; given once for each.")  # fmt: skip
@_CALIBRATE
@_task_options
def classify(
    text: str | None, labels: tuple[str, ...], calibrate: bool, instruction: str | None,
    raw: bool, lines: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Which label TEXT gets, or what is piped in, and how likely."""
    asked = {"labels": labels, "calibrate": calibrate}
    for found in _answers("classify", text, lines, options, asked, instruction, raw):
        _show(found, as_json)


@click.command()
@click.argument("query", required=False)
@click.option("-r", "--route", "routes", multiple=True, required=True, metavar="NAME=DESCRIPTION",
              help="Where it may go; given once for each.")  # fmt: skip
@_CALIBRATE
@_task_options
def route(
    query: str | None, routes: tuple[str, ...], calibrate: bool, instruction: str | None,
    raw: bool, lines: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Which route QUERY should take, or what is piped in, and how surely."""
    asked = {"routes": described_routes(routes), "calibrate": calibrate}
    for found in _answers("route", query, lines, options, asked, instruction, raw):
        _show(found, as_json)


@click.command()
@click.argument("text", required=False)
@click.option("--schema", required=True, metavar="FILE", help="JSON Schema: a file, or its text.")
@_task_options
@field_options(GenerationOptions, leave_out=("stop", "logprobs"))
def extract(
    text: str | None, schema: str, instruction: str | None, raw: bool, lines: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """What TEXT says, or what is piped in, as JSON of a schema."""
    asked = {"schema": read_file_or_text(schema)}
    for found in _answers("extract", text, lines, options, asked, instruction, raw):
        print_json(found)


def _answers(
    task: str, text: str | None, lines: bool, options: dict[str, Any], asked: dict[str, Any],
    instruction: str | None, raw: bool,
) -> Iterator[Any]:  # fmt: skip
    """What a task gives for each text, as soon as those before it are there."""
    model, texts = load_model(options), _texts(text, lines)
    asked |= {"instruction": instruction, "raw": raw, **given(options)}
    # lines of a pipe may come one by one, and are answered so; those of a file are all there
    asked["width"] = None if _is_file(sys.stdin) else 1
    for row in model.batch(texts, task, progress=False, **asked):
        if row.error is not None:
            raise OptionError(f"text {row.index + 1}: {row.error}") if lines else row.error
        yield row.value


def _is_file(stream: Any) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


def _texts(text: str | None, lines: bool) -> Iterator[str]:
    if not lines:
        return iter([argument_or_piped(text, "text")])
    if text is not None:
        raise OptionError("--lines reads what is piped in, and takes no text beside it")
    check_piped("text")
    return (line for line in sys.stdin if line.strip())


def _show(found: Classification, as_json: bool) -> None:
    if as_json:
        shares = {name: round(share, 6) for name, share in found.probabilities.items()}
        print_json({
            "label": found.label, "probability": round(found.probability, 6),
            "probabilities": shares, "prompt_tokens": found.prompt_tokens,
            "reused_tokens": found.reused_tokens,
        })  # fmt: skip
    else:
        click.echo(f"{found.label}\t{found.probability:.3f}")
