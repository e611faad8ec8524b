"""The plots of a report's page, drawn by matplotlib as SVG that takes its colours from the page.

A plot is drawn at the width of a phone, with text as text and stand-in colours; the stand-ins then
become CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemma_multi.errors import BackendError

INSTALL = "pip install 'gemma-multi[report]'"
_WIDTH, _HEIGHT = 4.6, 2.9  # inches at 72 to the inch: 331 by 209
_INK, _FAINT, _LIMIT = "#010203", "#010204", "#010205"
_SERIES = ("#010206", "#010207", "#010208", "#010209")
_VARIABLES = {
    _INK: "ink", _FAINT: "faint", _LIMIT: "limit",
    **{colour: f"series-{i + 1}" for i, colour in enumerate(_SERIES)},
}  # fmt: skip
_MARKS = "os^D"


@dataclass(frozen=True)
class Line:
    """One series of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    limit: float = math.inf  # what is allowed
    joined: bool = True  # with a line from point to point
    marked: bool = True  # each point
    ranges: Sequence[tuple[float, float]] = ()  # (low, high) of each, drawn as a bar


def check_matplotlib() -> Any:
    """Matplotlib without a window. Raises BackendError where it is missing."""
    try:
        import matplotlib
        import matplotlib.ticker
    except ImportError:
        raise BackendError(f"plots need matplotlib, not installed: {INSTALL}") from None
    matplotlib.use("svg")
    return matplotlib


def plot(
    lines: Sequence[Line], x_label: str, y_label: str, *,
    upright: Sequence[tuple[float, str]] = (), names: Sequence[str] = (),
    logarithmic_x: bool = False, logarithmic_y: bool = True, from_zero: bool = False,
) -> str:  # fmt: skip
    """An `<svg>`. A logarithmic y axis shows what is above zero; any other begins there if
    `from_zero`.

    `upright` marks places on the x axis, `names` label its whole numbers.
    """
    matplotlib = check_matplotlib()
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "parity", "font.size": 9.0}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        above = 0 if logarithmic_y else -np.inf
        for i, line in enumerate(lines):
            y = [value if above < value < np.inf else np.nan for value in line.y]
            axes.plot(
                line.x, y, color=_SERIES[i % len(_SERIES)], marker=_MARKS[i % len(_MARKS)],
                markersize=line.marked * 3.5, linewidth=1.2 if line.joined else 0, label=line.label,
            )  # fmt: skip
            if line.ranges:
                low, high = zip(*line.ranges, strict=True)
                axes.vlines(line.x, low, high, color=_SERIES[i % len(_SERIES)], linewidth=1)
        values = [value for line in lines for value in line.y if 0 < value < np.inf]
        limits = _limits(lines)
        if from_zero:
            axes.set_ylim(0, 1.1 * max(values, default=1))
        if values and logarithmic_y:
            axes.set_yscale("log")
            bottom, top = min(values), max([*values, *(limit for limit, _ in limits)])
            axes.set_ylim(bottom / 3, top * 4)
        for limit, colour in limits:
            axes.axhline(limit, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate("allowed", (0.99, limit), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color=colour, fontsize=8)  # fmt: skip
        if logarithmic_x:
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(
                matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}")
            )
        for place, label in upright:
            axes.axvline(place, color=_FAINT, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(label, (place, 0.02), xycoords=("data", "axes fraction"), ha="right",
                          va="bottom", rotation=90, color=_INK, fontsize=8)  # fmt: skip
        if names:
            step = -(-len(names) // 12)
            axes.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right")
        _dress(axes, x_label, y_label)
        if len(lines) > 1:
            axes.legend(
                frameon=False, labelcolor=_INK, fontsize=8, loc="lower left", ncols=3,
                bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.2, handletextpad=0.4,
            )  # fmt: skip  # above, where no line can cross it
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _with_page_colours(out.getvalue(), f"{y_label} by {x_label}")


def _limits(lines: Sequence[Line]) -> list[tuple[float, str]]:
    """(limit, colour): one of its own for all lines, or each line's."""
    limits = [line.limit for line in lines]
    if len(set(limits)) == 1:
        return [(limits[0], _LIMIT)] if limits[0] < math.inf else []
    coloured = zip(limits, _SERIES * len(limits), strict=False)
    return [(limit, colour) for limit, colour in coloured if limit < math.inf]


def _dress(axes: Any, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    axes.tick_params(colors=_INK, which="both", labelsize=8)
    axes.grid(color=_FAINT, linewidth=0.5, axis="y")
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(_FAINT)


def _with_page_colours(svg: str, title: str) -> str:
    """The `<svg>` element alone, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # what matplotlib leaves at its default is black
    svg = re.sub(r"font: ([\d.]+)px '[^']*'[^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{body}'
