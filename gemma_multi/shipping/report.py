"""ShipReport: what came of it, as values, for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi import __version__
from gemma_multi.chat_template import Message
from gemma_multi.scoring import LOSS, Estimate, Score, Scoring
from gemma_multi.shipping.stages import AFTER, BEFORE, FILE, MODEL, SHIPPED, Shipment

if TYPE_CHECKING:
    from rich.console import RenderableType

PAGE, FACTS = "report.html", "report.json"


@dataclass(frozen=True)
class Asked:
    """A held-out row and what each side said."""

    where: str
    question: list[Message]
    expected: str
    answers: dict[str, str]  # by when
    right: dict[str, bool]


@dataclass(frozen=True)
class ShipReport:
    """A specialist that ships, and how good it is."""

    output: Path
    source: str
    license: str
    license_link: str
    modifications: tuple[str, ...]
    training_rows: int
    scoring: Scoring
    scores: dict[str, Score]  # "before", "after" (in float) and "shipped" (the file)
    rows: tuple[Asked, ...]  # none where the score is a loss
    notes: tuple[str, ...]
    facts: Mapping[str, dict[str, Any]]  # by stage
    seconds: Mapping[str, float]  # by stage

    @property
    def file(self) -> Path:
        return self.output / FILE

    @property
    def model(self) -> Path:
        """The int4 directory that the file was exported from."""
        return self.output / MODEL

    @property
    def page(self) -> Path:
        return self.output / PAGE

    @property
    def passed(self) -> bool:
        """Whether the file computes what was trained, within tolerance."""
        return bool(self.facts["compare"]["summary"]["passed"])

    @property
    def good(self) -> bool:
        """Whether to ship it: it is what was trained, and no worse than what was there before."""
        return self.passed and self._gain >= 0

    @property
    def _gain(self) -> float:
        """Above zero where the file is better than the model as it came."""
        before, shipped = self.scores[BEFORE].estimate.value, self.scores[SHIPPED].estimate.value
        return before - shipped if self.scoring.kind == LOSS else shipped - before

    @property
    def headline(self) -> str:
        before, shipped = self.scores[BEFORE].estimate, self.scores[SHIPPED].estimate
        unseen = f"{shipped.count} unseen rows"
        if self.scoring.kind == LOSS:
            return f"Perplexity {shipped.value:.3g} on {unseen}, {before.value:.3g} before"
        return f"{shipped.value:.0%} of {unseen} right, {before.value:.0%} before"

    @property
    def verdict(self) -> str:
        """Whether training was worth it, as far as so many rows can say."""
        before, shipped = self.scores[BEFORE].estimate, self.scores[SHIPPED].estimate
        if shipped.low > before.high or shipped.high < before.low:
            return ("Training made it better, beyond what chance explains."
                    if self._gain > 0 else "Training made it worse; do not ship this.")  # fmt: skip
        if not self._gain:
            return "Training changed nothing that these held-out rows can show."
        return (
            f"It got {'better' if self._gain > 0 else 'worse'}, but by no more than chance could "
            "explain with so few held-out rows."
        )

    @property
    def wrong(self) -> list[Asked]:
        """Rows that the file got wrong."""
        return [row for row in self.rows if not row.right[SHIPPED]]

    @property
    def parity_line(self) -> str:
        found = self.facts["compare"]["summary"]
        line = (
            f"most likely token the same at {found['top1']:.1%} of {found['positions']:,} "
            f"positions, KL {found['divergence']:.2g} nats"
        )
        if self.rows:
            same = sum(row.answers[AFTER] == row.answers[SHIPPED] for row in self.rows)
            line += f", {same} of {len(self.rows)} answers the same"
        return line if self.passed else f"{line}; {'; '.join(found['failures'])}"

    def __str__(self) -> str:
        return f"{self.headline}. {self.verdict} The file is {self.file}, the page {self.page}"

    def to_table(self) -> RenderableType:
        """For a terminal of 80 columns."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        scores = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("", "score", "95% interval"):
            scores.add_column(name, no_wrap=True)
        for when, title in self.titles.items():
            estimate = self.scores[when].estimate
            scores.add_row(title, self.shown(estimate.value), self.interval(estimate))
        facts = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in {**self.device, "parity": self.parity_line,
                            "file": str(self.file), "page": str(self.page)}.items():  # fmt: skip
            facts.add_row(name, Text(value))
        style = "bold green" if self.good else "bold red"
        return Group(Text(f"\n{self.headline}.", style=style), Text(self.verdict), Text(),
                     scores, Text(), facts)  # fmt: skip

    @property
    def titles(self) -> dict[str, str]:
        """What the score of each time is of."""
        run = self.facts["run"]
        labels = " (held to the labels)" if self.scoring.labels else ""
        return {
            BEFORE: f"as it came{labels}",
            AFTER: f"trained, in float on {self.facts['after']['backend']}",
            SHIPPED: f"the file, in {run['asked_in']}",
        }

    @property
    def device(self) -> dict[str, str]:
        """Size, speed and memory of the file, in words."""
        run, memory = self.facts["run"], self.facts["run"]["memory_bytes"]
        speed = f"{run['decode_tokens_per_second']:,.0f} tokens/s written, "
        speed += f"{run['prefill_tokens_per_second']:,.0f} read, on {run['cores']} cores here"
        return {
            "size": f"{self.facts['export']['bytes'] / 1e6:,.1f} MB of "
                    f"{self.facts['export']['precision']}",
            "ran in": run["runtime"],
            "speed": speed,
            **({"memory": f"{memory / 1e6:,.0f} MB at most, Python aside"} if memory else {}),
            "time": f"{sum(self.seconds.values()) / 60:.1f} minutes, of which training "
                    f"{self.seconds['train'] / 60:.1f}",
        }  # fmt: skip

    def shown(self, value: float) -> str:
        return f"{value:.3g}" if self.scoring.kind == LOSS else f"{value:.0%}"

    def interval(self, estimate: Estimate) -> str:
        return f"{self.shown(estimate.low)} to {self.shown(estimate.high)}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values for JSON."""
        return {
            "version": __version__, "passed": self.passed, "headline": self.headline,
            "verdict": self.verdict, "file": str(self.file), "model": str(self.model),
            "page": str(self.page), "source": self.source, "license": self.license,
            "modifications": list(self.modifications), "training_rows": self.training_rows,
            "scoring": asdict(self.scoring),
            "scores": {when: asdict(score) for when, score in self.scores.items()},
            "rows": [asdict(row) for row in self.rows], "notes": list(self.notes),
            "seconds": dict(self.seconds), "stages": dict(self.facts),
        }  # fmt: skip


def report_of(shipment: Shipment) -> ShipReport:
    """What the finished stages found."""
    split, journal = shipment.split, shipment.journal
    answers = {when: shipment.answers(when) for when in (BEFORE, AFTER, SHIPPED)}
    scores = {when: one.score(split.scoring, shipment.expected) for when, one in answers.items()}
    rows = []
    for i, one in enumerate(split.held if split.scoring.kind != LOSS else ()):
        rows.append(Asked(
            one.where, one.question or [], one.answer or "",
            {when: found.texts[i].strip() for when, found in answers.items()},
            {when: score.right[i] for when, score in scores.items()},
        ))  # fmt: skip
    shipped = shipment.shipped.provenance
    return ShipReport(
        shipment.directory, shipped.source, shipped.license, shipped.license_link,
        shipped.modifications, len(split.training), split.scoring, scores, tuple(rows),
        split.notes, {name: journal.facts(name) for name in journal.stages}, journal.seconds,
    )  # fmt: skip
