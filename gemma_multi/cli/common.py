"""What the commands share: options, loading with them, printing JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def source_options(command: Command) -> Command:
    """Where a model on the hub comes from."""
    for option in (
        click.option("--local-files-only", is_flag=True, help="Never ask the hub."),
        click.option("--revision", help="Branch, tag or commit of a hub repository."),
    ):
        command = option(command)
    return command


def model_options(command: Command) -> Command:
    command = source_options(command)
    for option in reversed(
        (
            click.option("-m", "--model", default="storyteller", show_default=True,
                         help="Bundled name, directory, exported file or Hugging Face id."),
            click.option("-b", "--backend", default="auto", show_default=True,
                         help="mlx, keras, litert or auto."),
            click.option("--precision", default="auto", show_default=True,
                         help="float32, bfloat16, int4, int8 or auto."),
            click.option("--context-length", type=int,
                         help="Tokens; all the model has if unset (LiteRT: at most 4096)."),
            click.option("--adapter", help="Directory of a LoRA adapter (PEFT's layout)."),
            click.option("--threads", type=int, help="LiteRT only: processor cores to use."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def generation_options(command: Command) -> Command:
    for option in reversed(
        (
            click.option("--max-tokens", type=int, help="The most tokens to generate."),
            click.option("--temperature", type=float, help="0 always takes the best token."),
            click.option("--top-k", type=int),
            click.option("--top-p", type=float),
            click.option("--min-p", type=float),
            click.option("--repetition-penalty", type=float),
            click.option("--seed", type=int, help="The same seed gives the same text."),
        )
    ):
        command = option(command)
    return command


def load_model(options: dict[str, Any]) -> Any:
    """Takes `load`'s options out of a command's and loads; the others are checked before."""
    from gemma_multi import GenerationOptions, load

    names = ("model", "backend", "precision", "context_length", "threads", "adapter",
             "revision", "local_files_only")  # fmt: skip
    chosen = {name: options.pop(name) for name in names}
    GenerationOptions.merge({}, options)
    return load(**chosen)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, ensure_ascii=False))
