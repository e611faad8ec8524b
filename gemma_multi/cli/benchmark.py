"""`bench`: how fast, how large and how thirsty here; with `--minutes`, whether memory is flat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import field_options, given, print_json, source_options
from gemma_multi.engines import backends as all_backends
from gemma_multi.errors import OptionError

if TYPE_CHECKING:
    from gemma_multi.benchmarking import BenchReport, SoakReport

_ONLY_BENCH = ("rounds", "conversations", "powermetrics")


@click.command()
@click.argument("model")
@click.option("-b", "--backends", metavar="NAMES",
              help="With commas; all if unset, with --minutes the one that suits.")  # fmt: skip
@click.option("--precisions", metavar="NAMES",
              help="float32, bfloat16, float16, sfp8, int4, int8, auto.")  # fmt: skip
@click.option("--device", "devices", metavar="NAMES", help="cpu, gpu or both, with a comma.")
@click.option("--rounds", type=int, help="How often each is measured, in turn.  [3]")
@click.option("--conversations", type=int, help="How many of the fixed ones.  [25]")
@click.option("--minutes", type=float, help="Converse so long instead, and watch the memory.")
@click.option("--context-length", type=int, help="Tokens of a session.  [2048]")
@click.option("--powermetrics", is_flag=True, default=None,
              help="Permit `sudo -n powermetrics`, which counts joules on macOS.")  # fmt: skip
@field_options({b.title: b.options for b in all_backends().values()}, leave_out=("device",))
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="A new directory: the figures as JSON, and a page with plots.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@source_options
def bench(
    model: str, minutes: float | None, output: Path | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Measure MODEL here: speed, memory, 25 conversations and what they cost.

    Each backend in each precision on each device runs in processes of its own, in turn. With
    --minutes, the exit status is 1 where memory grows or the process ends by itself.
    """
    from rich.console import Console

    from gemma_multi.benchmarking import bench as measure

    told = given(options)
    for name in ("backends", "precisions", "devices"):
        if name in told:
            told[name] = [one.strip() for one in told[name].split(",")]
    if output is not None:
        from gemma_multi.benchmarking.page import check_directory

        check_directory(output)
    report: BenchReport | SoakReport
    if minutes is None:
        report, failed = measure(model, **told), False
    else:
        report = _soak(model, minutes, told)
        failed = report.failed
    if output is not None:
        report.save(output)
    if as_json:
        print_json(report.to_dict())
    else:
        Console(highlight=False).print(report.to_table())
    if failed:
        raise click.exceptions.Exit(1)


def _soak(model: str, minutes: float, options: dict[str, Any]) -> SoakReport:
    from gemma_multi.benchmarking import soak

    for name in _ONLY_BENCH:
        if name in options:
            raise OptionError(f"--{name} is for a run without --minutes")
    for many, one in (("backends", "backend"), ("precisions", "precision"), ("devices", "device")):
        if many in options:
            names = options.pop(many)
            if len(names) > 1:
                raise OptionError(
                    f"--minutes watches one process; received {one}s {', '.join(names)}"
                )
            options[one] = names[0]
    return soak(model, minutes, **options)
