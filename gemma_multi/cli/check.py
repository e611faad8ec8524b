"""`parity` and `demo`: is it the same everywhere?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemma_multi.cli.common import print_json, source_options


@click.command()
@click.argument("model", default="storyteller")
@click.option("-b", "--backends", default="auto", show_default=True, metavar="NAMES",
              help="Separated by commas, alone or as keras:bfloat16 or litert:gpu; the first is "
              "what the others are compared with.")  # fmt: skip
@click.option("--against", metavar="REFERENCE",
              help="Compare with transformers, an exported file or a directory.")  # fmt: skip
@click.option("--prompts", type=click.Path(path_type=Path),
              help="A .jsonl or .txt file; the set that comes along if unset.")  # fmt: skip
@click.option("--precision", default="auto", show_default=True,
              help="Of backends that name none, as for generate.")  # fmt: skip
@click.option("--max-tokens", type=int, default=200, show_default=True, help="Of an answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampled answers.")
@click.option("--trace", is_flag=True, help="Compare hidden states; name the layer that drifts.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with plots.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def parity(
    model: str, backends: str, against: str | None, html: Path | None, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Compare MODEL's weights, tokens, logits and texts on several backends.

    The exit status is 1 when any of them is out of tolerance.
    """
    from rich.console import Console

    from gemma_multi.comparison import parity as run
    from gemma_multi.comparison.page import check_page

    if html is not None:
        check_page(html)
    names = backends if backends == "auto" else [name.strip() for name in backends.split(",")]
    report = run(model, names, against=against, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        Console(highlight=False).print(report.to_table())
    if html is not None:
        report.save(html)
    if not report.passed:
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--seed", type=int, default=7, show_default=True, help="Of the story.")
@click.option("--json", "as_json", is_flag=True, help="The stories and what was compared, as JSON.")
def demo(seed: int, as_json: bool) -> None:
    """Tell one bedtime story on every installed backend and from the phone's file; compare."""
    from gemma_multi.demo import run, show

    outcome = run(seed, silent=as_json)
    if as_json:
        print_json(outcome.to_dict())
    else:
        show(outcome)
    if not outcome.same:
        raise click.exceptions.Exit(1)
