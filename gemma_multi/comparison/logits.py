"""Level 3, logits: both sides read the same tokens; how far apart is what they expect next?

Every position of every prompt and of the answer to it is compared: the largest difference and the
root mean square of the logits, the Kullback-Leibler divergence of the distributions, and whether
the most likely token and the five most likely ones agree. Positions are told apart by whether the
sliding window already cuts: short of it, at its edge, past it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gemma_multi.comparison.tolerances import Tolerance

REGIONS = ("short", "at the window's edge", "past the window")
_TOP = 5
_CHUNK = 1 << 20  # logits looked at together: 4 MB, a few times


@dataclass(frozen=True)
class LogitsSummary:
    """Some positions together."""

    positions: int
    largest: float
    rms: float
    divergence: float  # mean, in nats a token
    top1: float  # share of positions, 0..1
    top5: float  # mean share of the five
    untied: float  # share whose most likely tokens agree, or tie


@dataclass
class LogitsResult:
    """All positions, and what they come to."""

    window: int
    allowed: Tolerance
    names: list[str] = field(default_factory=list)  # of the prompts
    # one entry per position compared:
    prompt: list[np.ndarray] = field(default_factory=list)
    position: list[np.ndarray] = field(default_factory=list)
    figures: list[np.ndarray] = field(default_factory=list)  # [n, 6], in LogitsSummary's order

    def add(self, prompt: str, start: int, mine: np.ndarray, theirs: np.ndarray) -> None:
        """Logits after positions `start`, ...: `f32[T, V]` each, the reference's first."""
        if not self.names or self.names[-1] != prompt:
            self.names.append(prompt)
        count = len(mine)
        self.prompt.append(np.full(count, len(self.names) - 1))
        self.position.append(np.arange(start, start + count))
        rows = max(1, _CHUNK // mine.shape[1])
        for i in range(0, count, rows):
            part = slice(i, i + rows)
            with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is judged
                self.figures.append(_compare(mine[part], theirs[part], self.allowed.tie))

    def summary_where(self, chosen: np.ndarray | None = None) -> LogitsSummary | None:
        """Of the positions chosen by a mask; None where there are none."""
        figures = np.concatenate([np.zeros((0, 6)), *self.figures])
        figures = figures if chosen is None else figures[chosen]
        if not len(figures):
            return None
        largest, square, divergence, top1, top5, untied = figures.T
        mean = float(divergence.mean())
        return LogitsSummary(
            len(figures), float(largest.max()), float(square.mean() ** 0.5),
            0.0 if mean < 0 else mean,  # by rounding; a NaN stays one
            float(top1.mean()), float(top5.mean()), float(untied.mean()),
        )  # fmt: skip

    @property
    def positions(self) -> np.ndarray:
        return np.concatenate(self.position)

    def by_region(self) -> dict[str, LogitsSummary | None]:
        edge, at = max(2, self.window // 16), self.positions
        return {
            REGIONS[0]: self.summary_where(at < self.window - edge),
            REGIONS[1]: self.summary_where(abs(at - self.window) <= edge),
            REGIONS[2]: self.summary_where(at > self.window + edge),
        }

    def by_prompt(self) -> dict[str, LogitsSummary]:
        prompt = np.concatenate(self.prompt)
        found = {name: self.summary_where(prompt == i) for i, name in enumerate(self.names)}
        return {name: summary for name, summary in found.items() if summary}

    def by_position(self, buckets: int = 32) -> list[tuple[int, LogitsSummary]]:
        """(the first position, summary) of about equal steps on a logarithmic axis."""
        at = self.positions
        edges = np.unique(np.geomspace(1, at.max() + 2, buckets + 1).astype(int)) - 1
        found = [
            (int(low), self.summary_where((at >= low) & (at < high)))
            for low, high in pairwise(edges)
        ]
        return [(low, summary) for low, summary in found if summary]

    @property
    def problems(self) -> list[str]:
        """What is out of tolerance, in words."""
        allowed, found = self.allowed, []
        parts = {"": self.summary_where(), **{f" {k}": s for k, s in self.by_region().items()}}
        for where, summary in parts.items():
            if summary is None:
                continue
            if not np.isfinite(summary.largest):
                found.append(f"a logit{where} is not finite")
            elif not summary.largest <= allowed.logit:
                found.append(f"a logit{where} differs by {summary.largest:.2g}")
            if not summary.divergence <= allowed.divergence:
                found.append(f"KL divergence{where} is {summary.divergence:.2g}")
        overall = parts[""]
        if overall and not overall.untied >= allowed.top1:
            found.append(f"top-1 agreement, ties aside, is {overall.untied:.2%}")
        return found

    @property
    def passed(self) -> bool:
        return bool(self.figures) and not self.problems

    @property
    def summary(self) -> str:
        whole = self.summary_where()
        if whole is None:
            return "no position was compared"
        figures = (
            f"{whole.positions:,} positions: largest difference {whole.largest:.2g}, "
            f"KL {whole.divergence:.2g}, top-1 {whole.top1:.2%}, top-5 {whole.top5:.2%}"
        )
        return "; ".join([figures, *self.problems])


def _compare(mine: np.ndarray, theirs: np.ndarray, tie: float) -> np.ndarray:
    """`f32[n, V]` twice -> `f64[n, 6]`, as LogitsSummary has them after `positions`."""
    difference = theirs - mine
    square = np.mean(difference * difference, axis=1, dtype=np.float64)
    np.abs(difference, out=difference)
    expected, received = _log_probabilities(mine), _log_probabilities(theirs)
    ratio = expected - received
    divergence = np.sum(np.exp(expected) * ratio, axis=1, dtype=np.float64)
    best_mine, best_theirs = _best(mine), _best(theirs)
    shared = [
        len(np.intersect1d(a, b)) / len(a) for a, b in zip(best_mine, best_theirs, strict=True)
    ]
    rows, other = np.arange(len(mine)), theirs.argmax(axis=1)
    same = mine.argmax(axis=1) == other
    untied = mine.max(axis=1) - mine[rows, other] <= tie
    return np.stack([difference.max(axis=1), square, divergence, same, shared, untied], axis=1)


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(
        "f4"
    )


def _best(logits: np.ndarray) -> np.ndarray:
    return np.argpartition(logits, -_TOP, axis=1)[:, -_TOP:]
