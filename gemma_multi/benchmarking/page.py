"""Reports of `bench` and `soak` as pages, with plots."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from gemma_multi import pages
from gemma_multi.benchmarking.report import SPEEDS, USE, BenchReport, Measured
from gemma_multi.benchmarking.soak_report import SoakReport
from gemma_multi.files import check_output, new_directory, write_json
from gemma_multi.pages import figures, table
from gemma_multi.plots import Line, check_matplotlib, plot
from gemma_multi.terminal import readable

_PLOTTED = 500  # samples


def check_directory(path: Path) -> None:
    """Refuses what `write` would refuse after minutes of work. Raises OptionError, CheckpointError,
    BackendError without matplotlib."""
    check_matplotlib()
    check_output(path, directory=True)


def write(path: Path, name: str, page: str, facts: dict[str, Any]) -> Path:
    """`name`.json and `name`.html in a new directory."""
    check_directory(path)
    with new_directory(path) as directory:
        write_json(directory / f"{name}.json", facts)
        (directory / f"{name}.html").write_text(page, encoding="utf-8")
    return path


def bench_page(report: BenchReport) -> str:
    """The whole HTML."""
    ran = report.ran
    names = [one.name for one in ran]
    drawn = [
        (plot([_line("prefill", ran, "prefill_tokens_per_second"),
               _line("decode", ran, "decode_tokens_per_second")], "", "tokens a second",
              names=names),
         "Read at once, and written one by one; bars are from the slowest round to the fastest."),
        (plot([_line("memory", ran, "peak_memory_bytes", 1e-6),
               _line("weights", ran, "weight_bytes", 1e-6)], "", "MB", names=names),
         "The process's peak memory, and what of it the weights alone take."),
        (plot([_line("time", ran, "conversations_seconds"), _line("CPU", ran, "cpu_seconds")], "",
              "seconds", names=names),
         "The conversations: by the clock, and of all cores together."),
    ]  # fmt: skip
    parts = [
        table(SPEEDS, _escaped(report.speed_rows)),
        f"<h2>Conversations: {report.conversations}</h2>", table(USE, _escaped(report.use_rows)),
        figures(drawn), *(f'<p class="soft">{escape(note)}</p>' for note in report.notes),
    ]  # fmt: skip
    if report.absent:
        parts += ["<h2>Did not run</h2>", table(["", "why"], _escaped(map(list, report.absent)))]
    return pages.document(report.headline, report.scope, parts)


def soak_page(report: SoakReport) -> str:
    """The whole HTML."""
    step = -(-len(report.samples) // _PLOTTED)
    samples = report.samples[::step]
    line = Line("memory", [one[0] / 60 for one in samples], [one[3] / 1e6 for one in samples],
                marked=False)  # fmt: skip
    drawn = plot([line], "minutes", "MB", logarithmic_y=False, from_zero=True)
    rows = [[name.replace("_", " "), readable(name, value)] for name, value in report.held.items()]
    parts = [
        figures([(drawn, "Memory of the process after each turn; the first quarter is left out of "
                  "the slope.")]),
        f"<p>{escape(report.details)}</p>", table(["", ""], rows),
    ]  # fmt: skip
    return pages.document(report.headline, report.scope, parts, "fail" if report.failed else "ok")


def _line(label: str, ran: list[Measured], name: str, scale: float = 1) -> Line:
    found = [(i, figure) for i, one in enumerate(ran) if (figure := one.figure(name)) is not None]
    return Line(
        label, [i for i, _ in found], [figure.median * scale for _, figure in found], joined=False,
        ranges=[(figure.low * scale, figure.high * scale) for _, figure in found],
    )  # fmt: skip


def _escaped(rows: Any) -> list[list[str]]:
    return [[escape(cell).replace("\n", " ") for cell in row] for row in rows]
