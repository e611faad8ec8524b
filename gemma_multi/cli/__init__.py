"""The command line: `gemma-multi generate`, `chat`, `finetune`, `quantize`, `export`, ...

Errors are one line on standard error and exit status 2. Standard output carries only what was
asked for; `--json` makes it one JSON object. One module per kind of command.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import click

from gemma_multi import __version__
from gemma_multi.cli import (
    apps,
    ask,
    batch,
    benchmark,
    chat,
    check,
    doctor,
    evaluate,
    files,
    serving,
    tasks,
    train,
)
from gemma_multi.errors import BatchStopped, GemmaError, TrainingStopped


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    _prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _showing_ours(warnings.showwarning)
            code = cli.main(arguments, prog_name="gemma-multi", standalone_mode=False)
    except (TrainingStopped, BatchStopped) as stopped:
        _fail(str(stopped))
        code = 130
    except GemmaError as error:
        code = _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        code = 2
    except click.ClickException as error:
        code = _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except OSError as error:  # of the streams: a full disk behind `>`
        code = _fail(f"{error.strerror or error}")
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_streams() -> None:
    """Any bytes may come in, any character may go out, and either stream may be closed."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  for as long as we live
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer keeps such bytes
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _showing_ours(others: Callable[..., None]) -> Callable[..., None]:
    """What shows this package's warnings in a line; those of others stay as they are."""

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if category.__module__.startswith("gemma_multi"):
            click.echo(f"gemma-multi: {message}", err=True)
        else:
            others(message, category, *where)

    return show


def _fail(message: str) -> int:
    click.echo(f"gemma-multi: {' '.join(message.split())}", err=True)
    return 2


class _Sections(click.Group):
    """Lists its commands by what they are for, in the order in which they are used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        widest = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in _COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(str(one.name), one.get_short_help_str(widest)) for one in commands]
                )


_COMMANDS: dict[str, tuple[click.Command, ...]] = {
    "Ask": (ask.generate, chat.chat, tasks.classify, tasks.extract, tasks.route, batch.batch),
    "Train": (train.ship, train.finetune, train.data, train.merge),
    "Files": (files.quantize, files.export, files.convert, files.push, files.trim, files.info,
              files.cache),
    "Serve": (serving.serve, apps.app),
    "Check": (check.parity, evaluate.evaluate, benchmark.bench, doctor.doctor, check.demo),
}  # fmt: skip


@click.group(cls=_Sections, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Gemma 3 270M: one model on MLX, Keras and LiteRT."""


for command in (one for commands in _COMMANDS.values() for one in commands):
    cli.add_command(command)
