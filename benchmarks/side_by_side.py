"""Times whole processes, ours and a peer's in turn, and prints medians and their ratio; or calls.

A measured process is a Python snippet that does its work between two readings of the clock; what
counts is its own clock and the peak of its resident memory. Runs alternate, so that a machine
that slows down slows both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

_FRAME = """
import json, os, resource, sys, time
sys.stdout, out = sys.stderr, sys.stdout
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
if sys.platform == "linux":  # getrusage counts the parent's memory before exec as well
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    peak = int(status["VmHWM"].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"seconds": seconds, "peak_mb": peak / 1e6}}), file=out)
"""


@dataclass(frozen=True)
class Measured:
    """Medians over the runs of one snippet."""

    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class Comparison:
    """One line of the table. `theirs` is None where there is nothing to compare with."""

    what: str
    ours: Measured
    theirs: Measured | None
    peer: str
    target: str


def measure(body: str) -> Measured:
    """Runs a snippet in a cold process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _FRAME.format(body=body)],
        capture_output=True, text=True, env={**os.environ, "KERAS_BACKEND": "jax"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{body}\nfailed:\n{done.stderr[-3000:]}")
    return Measured(**json.loads(done.stdout))


def compare(
    what: str, ours: str, theirs: str | None, *, peer: str = "", target: str = "", runs: int = 5
) -> Comparison:
    """Medians of `runs` of each snippet, in turn, after one run of each that is not counted."""
    mine: list[Measured] = []
    other: list[Measured] = []
    for i in track(range(runs + 1), what, transient=True):
        for body, kept in ((ours, mine), (theirs, other)):
            if body is not None:
                result = measure(body)
                if i:
                    kept.append(result)
    return Comparison(what, _median(mine), _median(other) if other else None, peer, target)


def seconds(*ways: Callable[[], Any], runs: int = 7) -> list[float]:
    """Medians of calls in this process, in turn; once before to warm up."""
    taken: list[list[float]] = [[] for _ in ways]
    for run in range(runs + 1):
        for way, times in zip(ways, taken, strict=True):
            started = time.perf_counter()
            way()
            if run:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def _median(results: list[Measured]) -> Measured:
    return Measured(
        statistics.median(r.seconds for r in results),
        statistics.median(r.peak_mb for r in results),
    )


def columns(words: Iterable[str], figures: Iterable[str]) -> Table:
    """A table of words, and of figures that stand at the right."""
    table = Table()
    for heading in words:
        table.add_column(heading)
    for heading in figures:
        table.add_column(heading, justify="right")
    return table


def show(comparisons: list[Comparison]) -> None:
    table = Table(title="medians; ratio is ours / peer's")
    for heading in ("what", "ratio", "ours", "peer", "memory ratio", "ours", "peer", "target"):
        table.add_column(heading, justify="left" if heading in ("what", "target") else "right")
    for c in comparisons:
        theirs = c.theirs
        table.add_row(
            f"{c.what}\n[dim]{c.peer}[/dim]" if c.peer else c.what,
            f"{c.ours.seconds / theirs.seconds:.2f}" if theirs else "",
            f"{c.ours.seconds:.2f} s",
            f"{theirs.seconds:.2f} s" if theirs else "",
            f"{c.ours.peak_mb / theirs.peak_mb:.2f}" if theirs else "",
            f"{c.ours.peak_mb:,.0f} MB",
            f"{theirs.peak_mb:,.0f} MB" if theirs else "",
            c.target,
        )
    Console(width=120).print(table)
