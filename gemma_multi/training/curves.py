"""`curves.png`: training and validation loss over the steps, and where the best step was."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from gemma_multi.files import write_atomically
from gemma_multi.training.history import History

_LOGARITHMIC = 20  # times that the loss falls: then a linear axis shows only the first part
_TRAINING, _VALIDATION, _BEST = "#9db8d9", "#d95f02", "#444444"


def draw_curves(history: History, path: Path, title: str) -> bool:
    """Writes the picture; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    steps, losses = history.curve("loss")
    smooth = smoothed(losses)
    axes.plot(steps, losses, color=_TRAINING, alpha=0.45, linewidth=0.8)
    axes.plot(steps, smooth, color="#3b6ea5", linewidth=1.6, label="training (smoothed)")
    shown = [*smooth]
    steps, losses = history.curve("validation_loss")
    if losses:
        shown += losses
        axes.plot(steps, losses, color=_VALIDATION, marker="o", markersize=4, label="validation")
        best = int(np.argmin(losses))
        axes.axvline(steps[best], color=_BEST, linestyle=":", linewidth=1)
        axes.annotate(
            f"best: {losses[best]:.3f} at step {steps[best]}", (steps[best], losses[best]),
            xytext=(0, 12), textcoords="offset points", color=_BEST, fontsize=9,
            ha="right" if steps[best] > max(steps) / 2 else "left",
        )  # fmt: skip
    low, high = min(shown), max(shown)
    if 0 < low < high / _LOGARITHMIC:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.6, high * 1.6)
    else:
        axes.set_ylim(low - 0.08 * (high - low) - 1e-3, high + 0.12 * (high - low) + 1e-3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    canvas.print_figure(picture, format="png", dpi=130)
    write_atomically(path, picture.getvalue())
    return True


def smoothed(values: list[float]) -> list[float]:
    """An exponential mean over about a twentieth of the run."""
    weight = 2 / (1 + max(1.0, len(values) / 20))
    smooth, mean = [], values[0] if values else 0.0
    for value in values:
        mean += weight * (value - mean)
        smooth.append(mean)
    return smooth
