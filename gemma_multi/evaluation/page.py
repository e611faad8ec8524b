"""The page of an evaluation, for people: the figures, what is taken for what, what went wrong."""

from __future__ import annotations

from html import escape

from gemma_multi.evaluation.report import (
    PART_COLUMNS,
    EvaluationReport,
    interval,
    part_rows,
    shown,
)
from gemma_multi.evaluation.task import Answered
from gemma_multi.pages import confusion_table, details, document, shorten, table
from gemma_multi.scoring import given_labels


def page(report: EvaluationReport) -> str:
    """The whole HTML."""
    found = report.findings
    figures = [[escape(name), f"<b>{shown(name, one.value)}</b>", interval(name, one)]
               for name, one in found.figures.items()]  # fmt: skip
    figures += [[escape(name), f"{value:.4g}", ""] for name, value in found.numbers.items()]
    parts = ["<h2>Figures</h2>", table(["", "", "95% interval"], figures)]
    for kind, scores in found.parts.items():
        rows = [[escape(cell) for cell in row] for row in part_rows(scores)]
        if rows:
            parts += [f"<h3>By {kind}</h3>", table([kind, *PART_COLUMNS], rows)]
    if found.shares:
        rows = [[f"<code>{escape(name)}</code>", shown(name, one.value), interval(name, one),
                 str(one.count)] for name, one in found.shares.items()]  # fmt: skip
        parts += ["<h3>By instruction</h3>", table(["", "kept", "95% interval", "rows"], rows)]
    if found.confusion:
        parts += [
            "<h3>What was given, by what was expected</h3>",
            confusion_table(found.confusion, given_labels(found.confusion)),
        ]
    parts += [_rows(report), _protocol(report)]
    return document(report.headline, report.scope, parts)


def _rows(report: EvaluationReport) -> str:
    header = ["row", "asked", "expected", "given"]
    right = [row for row in report.findings.rows if row.right]
    groups = {"Rows that are wrong": report.wrong, "Rows that are right": right}
    parts = [details(title, header, [*map(_row, rows)]) for title, rows in groups.items() if rows]
    return f"<h2>Rows</h2>{''.join(parts)}" if parts else ""


def _row(row: Answered) -> list[str]:
    said = escape(shorten(row.given))
    if row.probability is not None:
        said += f' <span class="soft">{row.probability:.0%}</span>'
    return [f'<span class="soft">{escape(row.where)}</span>', escape(shorten(row.asked)),
            escape(shorten(row.expected)), said]  # fmt: skip


def _protocol(report: EvaluationReport) -> str:
    facts = {**{f"model, {k}": v for k, v in report.model.items()},
             **{f"data, {k}": v for k, v in report.data.items()}, **report.protocol}  # fmt: skip
    rows = [[escape(name), f"<code>{escape(str(value))}</code>"]
            for name, value in facts.items() if value not in (None, "")]  # fmt: skip
    return "<h2>How it was measured</h2>" + table(["", ""], rows)
