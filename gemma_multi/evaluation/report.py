"""EvaluationReport: what was measured, of which weights, on which rows, and how; for a terminal, as
JSON and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi import __version__
from gemma_multi.evaluation.task import Answered, Findings
from gemma_multi.scoring import Estimate, PartScore, given_labels

if TYPE_CHECKING:
    from rich.console import RenderableType

# in the names of figures that are no shares
_NO_SHARES = ("perplexity", "bits_per_byte", "bleu", "chrf", "ter")


@dataclass(frozen=True)
class EvaluationReport:
    """Figures with their 95% intervals, and what they are figures of."""

    task: str
    model: Mapping[str, Any]  # source, revision, weights_sha256
    data: Mapping[str, Any]  # name, sha256, rows
    protocol: Mapping[str, Any]  # how it was asked, and on what
    findings: Findings
    seconds: float

    @property
    def headline(self) -> str:
        """The figure that counts, in words."""
        for name, value in self.findings.figures.items():
            return f"{name.capitalize()} {shown(name, value.value)} ({interval(name, value)})"
        return ", ".join(f"{name} {value:.4g}" for name, value in self.findings.numbers.items())

    @property
    def scope(self) -> str:
        """What was asked, in a line."""
        how = self.protocol
        return (
            f"{self.model['source']} on {how['backend']} ({how['weights']}), {self.task}, "
            f"{self.data['rows']} rows of {self.data['name']}, {self.seconds:.0f} s"
        )

    @property
    def wrong(self) -> list[Answered]:
        """Rows that were not right, where rows are."""
        return [row for row in self.findings.rows if not row.right]

    def __str__(self) -> str:
        return f"{self.scope}\n{self.headline}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values for JSON."""
        found = asdict(self.findings)
        del found["protocol"], found["count"]
        return {
            "version": __version__, "task": self.task, "model": dict(self.model),
            "data": dict(self.data), "protocol": dict(self.protocol), **found,
            "seconds": round(self.seconds, 2),
        }  # fmt: skip

    def to_table(self) -> RenderableType:
        """For a terminal of 80 columns."""
        from rich.console import Group
        from rich.text import Text

        from gemma_multi.terminal import plain_table

        found = self.findings
        figures = [[name, shown(name, one.value), interval(name, one)]
                   for name, one in found.figures.items()]  # fmt: skip
        figures += [[name, f"{value:.4g}", ""] for name, value in found.numbers.items()]
        blocks: list[RenderableType] = [
            Text(self.scope, style="dim"), Text(), plain_table(["", "", "95% interval"], figures)
        ]  # fmt: skip
        for kind, parts in found.parts.items():
            if parts:
                blocks += [Text(), plain_table([kind, *PART_COLUMNS], part_rows(parts))]
        if found.shares:
            shares = [[name, shown(name, one.value), interval(name, one), str(one.count)]
                      for name, one in found.shares.items()]  # fmt: skip
            blocks += [Text(), plain_table(["instruction", "kept", "95% interval", "rows"], shares)]
        if found.confusion:
            given = given_labels(found.confusion)
            if len(given) <= _MOST_COLUMNS:
                rows = [[label, *(str(row[one] or "·") for one in given)]
                        for label, row in found.confusion.items()]  # fmt: skip
                blocks += [Text(), plain_table(["expected \\ given", *given], rows)]
        return Group(*blocks)

    def save(self, path: str | Path) -> Path:
        """Writes a self-contained HTML page."""
        from gemma_multi.evaluation.page import page
        from gemma_multi.pages import check_page, write_page

        check_page(Path(path))
        return write_page(page(self), Path(path))

    def record(self, directory: str | Path) -> Path:
        """Adds this to the card of the model directory that was measured; see `record`."""
        from gemma_multi.evaluation.record import record

        return record(self, Path(directory))


_MOST_COLUMNS = 7  # of a confusion that a terminal holds
PART_COLUMNS = ("precision", "recall", "F1", "support")


def part_rows(parts: Mapping[str, PartScore]) -> list[list[str]]:
    return [
        [name, *(f"{shown('', one.value)} ({interval('', one)})"
                 for one in (part.precision, part.recall)),
         shown("", part.f1), str(part.recall.count)]
        for name, part in parts.items()
    ]  # fmt: skip


def shown(name: str, value: float) -> str:
    """A figure for people: a share in percent, any other as it is."""
    return f"{value:.1%}" if _is_share(name) else f"{value:.4g}"


def interval(name: str, one: Estimate) -> str:
    if _is_share(name):
        return f"{max(0, one.low):.0%} to {min(1, one.high):.0%}"
    return f"{one.low:.3g} to {one.high:.3g}"


def _is_share(name: str) -> bool:
    return not any(word in name for word in _NO_SHARES)
