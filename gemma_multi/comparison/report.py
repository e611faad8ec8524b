"""ParityReport: what a comparison found, as values, as text for a terminal, and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi import __version__
from gemma_multi.comparison.logits import LogitsSummary
from gemma_multi.comparison.prompts import Prompt

if TYPE_CHECKING:
    from rich.console import RenderableType

    from gemma_multi.comparison.run import Comparison


@dataclass(frozen=True)
class ParityReport:
    """One reference against one or more others; `passed` where all levels are in tolerance."""

    model: str
    comparisons: tuple[Comparison, ...]
    prompts: tuple[Prompt, ...]
    left_out: tuple[str, ...]  # shipped prompts that do not fit the model's context
    skipped: tuple[str, ...]  # backends that are not installed, where "auto" was asked for
    seed: int
    seconds: float

    @property
    def passed(self) -> bool:
        return all(comparison.passed for comparison in self.comparisons)

    @property
    def failures(self) -> list[str]:
        """Every level out of tolerance, in a sentence."""
        return [
            f"{comparison.other} against {comparison.reference}, {level}: {result.summary}"
            for comparison in self.comparisons
            for level, result in comparison.levels.items()
            if not result.passed
        ]

    @property
    def headline(self) -> str:
        """What was found, in a line."""
        names = [c.other.name for c in self.comparisons]
        others = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        reference, one = self.comparisons[0].reference.name, len(names) == 1
        if not self.passed:
            failed = [c.other.name for c in self.comparisons if not c.passed]
            verb = "does" if len(failed) == 1 else "do"
            return f"{' and '.join(failed)} {verb} not agree with {reference}"
        if any(c.text.divergences for c in self.comparisons):
            return f"{others} {'agrees' if one else 'agree'} with {reference}, within tolerance"
        return f"{others} {'gives' if one else 'give'} the same answers as {reference}"

    @property
    def scope(self) -> str:
        """What was looked at, in a line."""
        languages = {p.language for p in self.prompts} - {"und", "mul", "zxx"}
        spoken = f" in {len(languages)} languages" if len(languages) > 1 else ""
        line = f"{self.model}: {len(self.prompts)} prompts{spoken}, {self.seconds:.0f} s"
        if self.left_out:
            line += f"; {len(self.left_out)} prompts are too long for this model"
        if self.skipped:
            line += f"; not installed: {', '.join(self.skipped)}"
        return line

    def __str__(self) -> str:
        lines = [self.scope]
        for comparison in self.comparisons:
            lines.append(f"{comparison.other} against {comparison.reference}")
            for level, result in comparison.levels.items():
                lines.append(f"  {level:<8} {'ok  ' if result.passed else 'FAIL'} {result.summary}")
        return "\n".join([*lines, self.headline])

    def to_table(self) -> RenderableType:
        """For a terminal: one block per comparison, one row per level."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        blocks: list[RenderableType] = [Text(self.scope, style="dim")]
        for comparison in self.comparisons:
            blocks.append(
                Text(f"\n{comparison.other} against {comparison.reference}", style="bold")
            )
            table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column(no_wrap=True)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for level, result in comparison.levels.items():
                mark = Text("ok", "green") if result.passed else Text("FAIL", "bold red")
                table.add_row(level, mark, Text(result.summary))
            blocks.append(table)
        style = "bold green" if self.passed else "bold red"
        return Group(*blocks, Text(f"\n{self.headline}.", style=style))

    def to_dict(self) -> dict[str, Any]:
        """Everything but single positions, in plain values for JSON."""
        facts = {
            "version": __version__,
            "passed": self.passed,
            "headline": self.headline,
            "model": self.model,
            "prompts": len(self.prompts),
            "left_out": list(self.left_out),
            "skipped": list(self.skipped),
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "comparisons": [_comparison_dict(c) for c in self.comparisons],
        }
        plain: dict[str, Any] = _finite(facts)
        return plain

    def save(self, path: str | Path) -> Path:
        """Writes a self-contained HTML page with plots. Needs matplotlib."""
        from gemma_multi.comparison.page import write_page

        return write_page(self, Path(path))


def _comparison_dict(comparison: Comparison) -> dict[str, Any]:
    logits, text, layers = comparison.logits, comparison.text, comparison.layers
    whole = logits.summary_where()
    levels: dict[str, dict[str, Any]] = {
        "weights": {
            "tensors": comparison.weights.tensors,
            "compared_as": comparison.weights.compared_as,
            "sha256": list(comparison.weights.sha256),
            "different": [asdict(t) for t in comparison.weights.different],
        },
        "tokens": {
            "tokens": comparison.tokens.tokens,
            "different": [asdict(t) for t in comparison.tokens.different],
        },
        "logits": {
            **(_summary_dict(whole) or {}),
            "by_region": {k: _summary_dict(s) for k, s in logits.by_region().items()},
            "by_prompt": {k: _summary_dict(s) for k, s in logits.by_prompt().items()},
            "by_position": [
                {"from": low, **(_summary_dict(s) or {})} for low, s in logits.by_position()
            ],
        },
        "text": {
            "texts": text.texts,
            "tokens": text.tokens,
            "divergences": [asdict(d) for d in text.divergences],
        },
    }
    if layers is not None:
        levels["layers"] = {
            **asdict(layers),
            "drift": dict(zip(layers.names, layers.drift, strict=True)),
        }
    return {
        "reference": _subject_dict(comparison.reference),
        "other": _subject_dict(comparison.other),
        "passed": comparison.passed,
        "allowed": asdict(comparison.allowed),
        "levels": {
            name: {"passed": result.passed, "summary": result.summary, **levels[name]}
            for name, result in comparison.levels.items()
        },
    }


def _subject_dict(subject: Any) -> dict[str, Any]:
    engine = subject.model.engine
    return {
        "name": subject.name, "backend": engine.name, "device": engine.device,
        "weights": engine.precision, "activations": engine.compute,
    }  # fmt: skip


def _summary_dict(summary: LogitsSummary | None) -> dict[str, Any] | None:
    return None if summary is None else asdict(summary)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: None stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
