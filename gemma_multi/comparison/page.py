"""A parity report as one HTML file: no script, nothing fetched, light and dark, phone or desk."""

from __future__ import annotations

import math
import tempfile
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_multi import __version__
from gemma_multi.comparison.logits import REGIONS, LogitsSummary
from gemma_multi.comparison.plots import Line, check_matplotlib, plot
from gemma_multi.comparison.tolerances import Tolerance
from gemma_multi.errors import OptionError
from gemma_multi.files import write_atomically

if TYPE_CHECKING:
    from gemma_multi.comparison.report import ParityReport
    from gemma_multi.comparison.run import Comparison

_MOST_ROWS = 40  # of a table of differences
_LEVELS = {
    "weights": "the numbers each engine holds",
    "tokens": "the ids each side reads, and the text in them",
    "logits": "what is expected next, at every position of the same text",
    "text": "what is written, greedily and with one seed",
    "layers": "hidden states after each layer",
}
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1f23; --soft: #5b6470; --faint: #c9ced6;
  --card: #f5f6f8; --good: #11734b; --bad: #b3261e; --limit: #b3261e;
  --series-1: #1f6feb; --series-2: #c2571a; --series-3: #7a3fc0; --series-4: #11734b; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e6e8eb; --soft: #9aa4b0;
  --faint: #3a4149; --card: #1d2125; --good: #4cc38a; --bad: #ff8078; --limit: #ff8078;
  --series-1: #6cb0ff; --series-2: #ffa05c; --series-3: #c49bff; --series-4: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 48rem; }
.soft { color: var(--soft); }
.ok { color: var(--good); } .fail { color: var(--bad); }
.mark { font-weight: 600; white-space: nowrap; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; }
figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0;
  border-bottom: 1px solid var(--faint); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .85em; overflow-wrap: anywhere; }
details { margin: .75rem 0; } summary { cursor: pointer; }
"""


def check_page(path: Path) -> None:
    """Refuses what `write_page` would refuse after minutes of work."""
    check_matplotlib()
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"{path}: the page is HTML; give it a name that ends in .html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OptionError(f"{path}: cannot be written; its directory must exist")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_page(report: ParityReport, path: Path) -> Path:
    """Raises OptionError for a path that cannot be written, BackendError without matplotlib."""
    check_page(path)
    try:
        write_atomically(path, page(report).encode(errors="replace"))
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def page(report: ParityReport) -> str:
    """The whole HTML."""
    mark = "ok" if report.passed else "fail"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.headline)}</title><style>{_STYLE}</style></head><body>",
        f'<header><h1 class="{mark}">{escape(report.headline)}</h1>',
        f'<p class="soft">{escape(report.scope)}. Made by gemma_multi {__version__}.</p></header>',
        _overview(report),
        _plots(report),
    ]
    parts += [_section(comparison) for comparison in report.comparisons]
    parts += [_tolerances(report), _prompts(report), "</body></html>\n"]
    return "\n".join(parts)


def _overview(report: ParityReport) -> str:
    rows = []
    for comparison in report.comparisons:
        for level, result in comparison.levels.items():
            rows.append([escape(comparison.other.name), level, _mark(result.passed),
                         escape(result.summary)])  # fmt: skip
    reference = escape(str(report.comparisons[0].reference))
    return f"<p>Compared with <b>{reference}</b>:</p>" + _table(["", "level", "", "found"], rows)


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
    cards = "".join(
        f"<figure>{svg}<figcaption>{text}</figcaption></figure>" for svg, text in figures
    )
    return f'<h2>How far apart</h2><div class="plots">{cards}</div>'


def _section(comparison: Comparison) -> str:
    parts = [f"<h2>{escape(str(comparison.other))} {_mark(comparison.passed)}</h2>"]
    weights, tokens, layers = comparison.weights, comparison.tokens, comparison.layers
    same, held = weights.sha256[0] == weights.sha256[1], weights.sha256[1]
    parts.append(
        f'<p class="soft">Weights as held, as {weights.compared_as}: SHA-256 <code>{held}</code>'
        f"{', the reference has the same' if same else ''}.</p>"
    )
    if weights.different:
        rows = [[f"<code>{escape(t.name)}</code>", _number(t.largest), _number(t.share),
                 _mark(t.passed)] for t in weights.different]  # fmt: skip
        parts.append(_details("Tensors that differ", ["tensor", "largest", "share", ""], rows))
    if tokens.different:
        rows = [[escape(d.prompt), escape(d.what)] for d in tokens.different]
        parts.append(_details("Prompts that are read differently", ["prompt", "where"], rows))
    if layers is not None and not layers.passed:
        parts.append(f'<p class="fail">{escape(layers.summary)}.</p>')
    header = ["where", "positions", "largest", "RMS", "KL", "top-1", "top-5"]
    regions = comparison.logits.by_region()
    parts.append("<h3>Logits</h3>" + _table(header, [
        [name, *_figures(regions[name])] for name in REGIONS
    ]))  # fmt: skip
    ranked = sorted(comparison.logits.by_prompt().items(), key=lambda item: -item[1].largest)
    rows = [[escape(name), *_figures(summary)] for name, summary in ranked]
    parts.append(_details("By prompt, the worst first", ["prompt", *header[1:]], rows))
    parts.append(f"<h3>Text</h3><p>{escape(comparison.text.summary)}.</p>")
    if comparison.text.divergences:
        rows = [
            [escape(d.prompt), d.mode, str(d.position), f"<code>{escape(d.expected)}</code>",
             f"<code>{escape(d.received)}</code>", _number(d.gap),
             "a tie" if d.tie else _mark(False)]
            for d in sorted(comparison.text.divergences, key=lambda d: -d.gap)
        ]  # fmt: skip
        parts.append(_details(
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
    return "<h2>What is allowed</h2>" + _table(header, rows)


def _prompts(report: ParityReport) -> str:
    rows = [
        [escape(p.name), escape(p.kind), escape(p.language)] for p in report.prompts
    ]  # fmt: skip
    text = _details("The prompts", ["name", "kind", "language"], rows, most=1000)
    if report.left_out:
        text += f"<p>Too long for this model: {escape(', '.join(report.left_out))}.</p>"
    meaning = "".join(f"<li><b>{level}</b>: {what}</li>" for level, what in _LEVELS.items())
    return f"<h2>What was compared</h2><ul>{meaning}</ul>{text}"


def _figures(s: LogitsSummary | None) -> list[str]:
    if s is None:
        return ["none"] + [""] * 5
    return [f"{s.positions:,}", _number(s.largest), _number(s.rms), _number(s.divergence),
            f"{s.top1:.2%}", f"{s.top5:.2%}"]  # fmt: skip


def _mark(passed: bool) -> str:
    return f'<span class="mark {"ok" if passed else "fail"}">{"ok" if passed else "FAIL"}</span>'


def _number(value: float) -> str:
    text = f"{value:.1e}" if value and not 0.01 <= value < 1000 else f"{value:.3g}"
    return text.replace("-", "\u2011")  # at which no line breaks


def _limit(value: float) -> str:
    return "any" if value == math.inf else _number(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _details(title: str, header: list[str], rows: list[list[str]], most: int = _MOST_ROWS) -> str:
    more = f"<p>and {len(rows) - most} more; see the JSON.</p>" if len(rows) > most else ""
    return (
        f"<details><summary>{title} ({len(rows)})</summary>{_table(header, rows[:most])}{more}"
        "</details>"
    )
