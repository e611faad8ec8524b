"""A parity report as a page."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_multi import pages
from gemma_multi.comparison.logits import REGIONS, LogitsSummary
from gemma_multi.comparison.tolerances import Tolerance
from gemma_multi.pages import details, mark, number, table
from gemma_multi.plots import Line, check_matplotlib, plot

if TYPE_CHECKING:
    from gemma_multi.comparison.report import ParityReport
    from gemma_multi.comparison.run import Comparison

_LEVELS = {
    "weights": "the numbers each engine holds",
    "tokens": "the ids each side reads, and the text in them",
    "logits": "what is expected next, at every position of the same text",
    "text": "what is written, greedily and with one seed",
    "layers": "hidden states after each layer",
}


def check_page(path: Path) -> None:
    """Refuses what `write_page` would refuse after minutes of work."""
    check_matplotlib()
    pages.check_page(path)


def write_page(report: ParityReport, path: Path) -> Path:
    """Raises OptionError for a path that cannot be written, BackendError without matplotlib."""
    check_page(path)
    return pages.write_page(page(report), path)


def page(report: ParityReport) -> str:
    """The whole HTML."""
    parts = [_overview(report), _plots(report)]
    parts += [_section(comparison) for comparison in report.comparisons]
    parts += [_tolerances(report), _prompts(report)]
    return pages.document(report.headline, report.scope, parts, "ok" if report.passed else "fail")


def _overview(report: ParityReport) -> str:
    rows = []
    for comparison in report.comparisons:
        for level, result in comparison.levels.items():
            rows.append([escape(comparison.other.name), level, mark(result.passed),
                         escape(result.summary)])  # fmt: skip
    reference = escape(str(report.comparisons[0].reference))
    return f"<p>Compared with <b>{reference}</b>:</p>" + table(["", "level", "", "found"], rows)


def _plots(report: ParityReport) -> str:
    comparisons = report.comparisons
    window = comparisons[0].logits.window
    kinds = list(dict.fromkeys(prompt.kind for prompt in report.prompts))
    by_position, by_prompt, by_layer, divergence = [], [], [], []
    for c in comparisons:
        name, allowed, steps = c.other.name, c.allowed, c.logits.by_position()
        at = [low for low, _ in steps]
        by_position.append(Line(name, at, [s.largest for _, s in steps], allowed.logit))
        divergence.append(Line(name, at, [s.divergence for _, s in steps], allowed.divergence))
        worst = {prompt: s.largest for prompt, s in c.logits.by_prompt().items()}
        places = [kinds.index(prompt.kind) for prompt in report.prompts]
        values = [worst[prompt.name] for prompt in report.prompts]
        by_prompt.append(Line(name, places, values, allowed.logit, joined=False))
        if c.layers is not None:
            drift = c.layers.drift
            by_layer.append(Line(name, list(range(len(drift))), drift, allowed.hidden))
    marks = [(window, "window")] if window < max(comparisons[0].logits.positions) else []
    figures = [
        (plot(by_position, "position", "largest difference of a logit", upright=marks,
              logarithmic_x=True),
         "By position: what rounding adds up to, and what the sliding window does."),
        (plot(divergence, "position", "KL divergence, nats", upright=marks, logarithmic_x=True),
         "By position: how far apart the distributions are. Equal ones are not drawn."),
        (plot(by_prompt, "kind of prompt", "largest difference of a logit", names=kinds),
         "By prompt, one mark each; the worst ones are named below."),
    ]  # fmt: skip
    layers = next((c.layers for c in comparisons if c.layers is not None), None)
    if layers is not None:
        names = [
            name.replace(" (sliding)", "").replace(" (global)", " (g)") for name in layers.names
        ]
        figures.append((
            plot(by_layer, "after", "drift of hidden states", names=names),
            "By layer: the difference as a share of the hidden states; (g) attends globally.",
        ))  # fmt: skip
    return "<h2>How far apart</h2>" + pages.figures(figures)


def _section(comparison: Comparison) -> str:
    parts = [f"<h2>{escape(str(comparison.other))} {mark(comparison.passed)}</h2>"]
    weights, tokens, layers = comparison.weights, comparison.tokens, comparison.layers
    same, held = weights.sha256[0] == weights.sha256[1], weights.sha256[1]
    parts.append(
        f'<p class="soft">Weights as held, as {weights.compared_as}: SHA-256 <code>{held}</code>'
        f"{', the reference has the same' if same else ''}.</p>"
    )
    if weights.different:
        rows = [[f"<code>{escape(t.name)}</code>", number(t.largest), number(t.share),
                 mark(t.passed)] for t in weights.different]  # fmt: skip
        parts.append(details("Tensors that differ", ["tensor", "largest", "share", ""], rows))
    if tokens.different:
        rows = [[escape(d.prompt), escape(d.what)] for d in tokens.different]
        parts.append(details("Prompts that are read differently", ["prompt", "where"], rows))
    if layers is not None and not layers.passed:
        parts.append(f'<p class="fail">{escape(layers.summary)}.</p>')
    header = ["where", "positions", "largest", "RMS", "KL", "top-1", "top-5"]
    regions = comparison.logits.by_region()
    parts.append("<h3>Logits</h3>" + table(header, [
        [name, *_figures(regions[name])] for name in REGIONS
    ]))  # fmt: skip
    ranked = sorted(comparison.logits.by_prompt().items(), key=lambda item: -item[1].largest)
    rows = [[escape(name), *_figures(summary)] for name, summary in ranked]
    parts.append(details("By prompt, the worst first", ["prompt", *header[1:]], rows))
    parts.append(f"<h3>Text</h3><p>{escape(comparison.text.summary)}.</p>")
    if comparison.text.divergences:
        rows = [
            [escape(d.prompt), d.mode, str(d.position), f"<code>{escape(d.expected)}</code>",
             f"<code>{escape(d.received)}</code>", number(d.gap),
             "a tie" if d.tie else mark(False)]
            for d in sorted(comparison.text.divergences, key=lambda d: -d.gap)
        ]  # fmt: skip
        parts.append(details(
            "Where texts part", ["prompt", "", "token", "reference", "other", "gap", ""], rows
        ))  # fmt: skip
    return "\n".join(parts)


def _tolerances(report: ParityReport) -> str:
    used: dict[Tolerance, str] = {}
    for comparison in report.comparisons:
        pair = f"{comparison.other.compute} against {comparison.reference.compute}"
        used.setdefault(comparison.allowed, pair)
    rows = [
        [escape(pair), _limit(t.weight), _limit(t.logit), _limit(t.divergence), f"{t.top1:.1%}",
         _limit(t.tie), _limit(t.hidden), escape(t.reason)]
        for t, pair in used.items()
    ]  # fmt: skip
    header = ["activations", "weight", "logit", "KL", "top-1", "tie", "hidden", "why"]
    return "<h2>What is allowed</h2>" + table(header, rows)


def _prompts(report: ParityReport) -> str:
    rows = [
        [escape(p.name), escape(p.kind), escape(p.language)] for p in report.prompts
    ]  # fmt: skip
    text = details("The prompts", ["name", "kind", "language"], rows, most=1000)
    if report.left_out:
        text += f"<p>Too long for this model: {escape(', '.join(report.left_out))}.</p>"
    meaning = "".join(f"<li><b>{level}</b>: {what}</li>" for level, what in _LEVELS.items())
    return f"<h2>What was compared</h2><ul>{meaning}</ul>{text}"


def _figures(s: LogitsSummary | None) -> list[str]:
    if s is None:
        return ["none"] + [""] * 5
    return [f"{s.positions:,}", number(s.largest), number(s.rms), number(s.divergence),
            f"{s.top1:.2%}", f"{s.top5:.2%}"]  # fmt: skip


def _limit(value: float) -> str:
    return "any" if value == math.inf else number(value)
