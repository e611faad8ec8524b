"""`doctor`: what will run here, how fast it should be, what one command would add, and, with
`--verify`, whether to trust it."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gemma_multi.cli.common import print_json

if TYPE_CHECKING:
    from gemma_multi.diagnosis import Diagnosis
    from gemma_multi.machine import Machine
    from gemma_multi.self_test import SelfTest

_INDENT = " " * 9


@click.command()
@click.option("-b", "--backends", "names", metavar="NAMES",
              help="Only these, separated by commas.")  # fmt: skip
@click.option("--verify", is_flag=True,
              help="Check each backend, a minute in all, and say whether to trust it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def doctor(names: str | None, verify: bool, as_json: bool) -> None:
    """Say what will run here, how fast, and what to install for more.

    The exit status is 2 where no backend works, and 1 where one is not to be trusted.
    """
    from gemma_multi.diagnosis import diagnose
    from gemma_multi.machine import look_at_the_machine
    from gemma_multi.self_test import self_test

    chosen = names and [name.strip() for name in names.split(",")]
    found = diagnose(chosen or None)
    machine = look_at_the_machine()
    if not as_json:
        for line in _lines(machine, found, verify):
            click.echo(line)
    working = [one.backend for one in found if one.works]
    verified = self_test(working, progress=not as_json) if verify else []
    if as_json:
        print_json(_facts(machine, found, verified))
    else:
        for one in verified:
            for line in _wrapped(f"{one.backend:<8} {one.sentence}"):
                click.secho(line, fg="green" if one.trusted else "red")
    if not working:
        raise click.exceptions.Exit(2)
    if not all(one.trusted for one in verified):
        raise click.exceptions.Exit(1)


def _lines(machine: Machine, found: Sequence[Diagnosis], verified: bool) -> Iterator[str]:
    python = platform.python_version()
    memory = f", {machine.memory_bytes / 1e9:.0f} GB of memory" if machine.memory_bytes else ""
    yield f"{machine.system}, Python {python}, {machine.cores} cores{memory}"
    for one in found:
        gpu = "" if not one.works or one.gpu.startswith("none") else f"; GPU: {one.gpu}"
        works = f"works on {one.device}, a story at {one.tokens_per_second:.0f} tokens/s{gpu}"
        yield from _wrapped(f"{one.backend:<8} {works if one.works else 'does not work'}")
    if any(one.works for one in found):
        yield from _wrapped(
            f"Gemma 3 270M in int4: at most {machine.most_tokens_per_second:.0f} tokens/s on this "
            f"processor, whose memory gives {machine.bytes_per_second / 1e9:.0f} GB/s just now", ""
        )  # fmt: skip
    for one in found:
        if one.advice:
            yield from _wrapped(f"{one.backend:<8} {one.advice}")
    if not verified:
        yield "gemma-multi doctor --verify says in a minute whether to trust them"


def _wrapped(line: str, indent: str = _INDENT) -> list[str]:
    return textwrap.wrap(line, 79, subsequent_indent=indent, break_on_hyphens=False)


def _facts(
    machine: Machine, found: Sequence[Diagnosis], verified: Sequence[SelfTest]
) -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": asdict(machine), "backends": {}}
    for one in found:
        facts["backends"][one.backend] = asdict(one)
        del facts["backends"][one.backend]["backend"]
    for asked in verified:
        facts["backends"][asked.backend]["verified"] = {
            "trusted": asked.trusted, "seconds": round(asked.seconds, 1),
            "checks": [asdict(check) for check in asked.checks],
        }  # fmt: skip
    return facts
