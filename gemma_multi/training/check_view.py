"""A DataReport on a terminal, with its lengths as a picture."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from gemma_multi.training.check import NAMED, DataReport

_BAR = 40  # characters, of the longest


def show(report: DataReport) -> None:
    console = Console(file=sys.stdout, highlight=False)
    plain = console.print

    def say(text: str, style: str = "") -> None:
        plain(Text(text, style))

    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    say(f"{report.name}: {report.rows:,} rows" + f" ({kinds})" * bool(kinds), "bold")
    if report.roles:
        say("roles       " + ", ".join(f"{n:,} {role}" for role, n in report.roles.items()))
    if report.lengths:
        share = report.answer_tokens / max(1, report.tokens)
        say(f"tokens      {report.tokens:,}, {share:.0%} of them answers")
        shortest, median, most, longest = report.lengths
        say(f"a row       {shortest} to {longest} tokens, median {median}, 95% up to {most}\n")
        highest = max(count for _, count in report.histogram)
        for upto, count in report.histogram:
            bar = "█" * round(_BAR * count / highest) or "▏" * bool(count)
            style = "yellow" if upto > report.max_length else "cyan"
            plain(Text(f"{upto:>11,} ").append(bar, style).append(f" {count:,}"))
        plain()
    for count, what, lines, style in (
        (report.duplicates, "rows are there more than once", report.duplicate_lines, "yellow"),
        (report.too_long, f"rows are longer than {report.max_length} tokens",
         report.too_long_lines, "yellow"),
        (report.leaked or 0, "rows are in the validation data as well", report.leaked_lines,
         "yellow"),
    ):  # fmt: skip
        if count:
            more = ", ..." if count > len(lines) else ""
            say(f"{count:,} {what}: line {', '.join(map(str, lines))}{more}", style)
    for bad in report.bad_rows:
        say(bad, "red")
    if report.bad > NAMED:
        say(f"... and {report.bad - NAMED:,} more", "red")
    if report.ok:
        say("Training can begin.", "green")
    elif report.too_long and not report.bad:
        say("finetune refuses rows that are too long, unless told --too-long cut or skip, or a "
            "higher --max-length.", "red")  # fmt: skip
    elif report.bad:
        say(f"{report.bad:,} rows cannot be used; mend or remove them.", "red")
    else:
        say("There is too little to learn from; give it 10 rows or more.", "red")
