"""SoakReport: memory over a long run, and whether it stayed flat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi import __version__
from gemma_multi.benchmarking.trend import FLAT, GROWS, LEAST, SHORT, UNCLEAR, Trend, trend

if TYPE_CHECKING:
    from rich.console import RenderableType

STOPPED = "stopped"  # by Ctrl-C
_MOST_SAMPLES = 2000  # in JSON
_SENTENCES = {
    FLAT: "Memory is flat",
    GROWS: "Memory grows, something leaks",
    UNCLEAR: "Memory rose, but not steadily; run it longer",
    SHORT: f"Too short to say; {LEAST} turns are the least",
}


@dataclass
class SoakReport:
    """(seconds, conversation, turn, bytes) after each turn, and what follows from them."""

    model: str
    minutes: float  # as asked for
    place: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    ended: str = ""  # why before its time, if it did

    def hear(self, told: Mapping[str, Any]) -> None:
        """What the process that converses tells."""
        if "place" in told:
            self.place = told["place"]
        if "sample" in told:
            self.samples.append(tuple(told["sample"]))

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] if self.samples else 0.0

    @property
    def turns(self) -> int:
        return self.samples[-1][2] if self.samples else 0

    @property
    def conversations(self) -> int:
        """Begun."""
        return self.samples[-1][1] + 1 if self.samples else 0

    @cached_property
    def trend(self) -> Trend:
        """By turn. Of a report that hears nothing more."""
        return trend([one[2] for one in self.samples], [one[3] for one in self.samples])

    @property
    def leaks(self) -> bool:
        return self.trend.verdict == GROWS

    @property
    def failed(self) -> bool:
        """Whether memory grows, or the process ended by itself."""
        return self.leaks or self.ended not in ("", STOPPED)

    @property
    def headline(self) -> str:
        """The verdict, and the slope."""
        found = self.trend
        slope = "" if found.verdict == SHORT else f": {_mb(found.slope)} MB a turn"
        return f"{_SENTENCES[found.verdict]}{slope}"

    @property
    def details(self) -> str:
        """What the verdict is made of; nothing where there is none."""
        found = self.trend
        if found.verdict == SHORT:
            return ""
        each = self.turns / self.conversations
        return (
            f"MB a turn: {_mb(found.low)} to {_mb(found.high)} with 95%, seen from "
            f"{_mb(found.visible)} on; MB a conversation: {_mb(found.slope * each)}"
        )

    @property
    def scope(self) -> str:
        place = self.place
        ended = f"; ended early: {self.ended}" if self.ended else ""
        return (
            f"{self.model} on {place['backend']} {place['weights']} {place['device']}: "
            f"{self.conversations:,} conversations, {self.turns:,} turns in "
            f"{self.seconds / 60:.1f} minutes{ended}"
        )

    @property
    def held(self) -> dict[str, int]:
        """Bytes in memory."""
        held = [one[3] for one in self.samples]
        return {"first_bytes": held[0], "median_bytes": round(self.trend.held),
                "peak_bytes": max(held), "last_bytes": held[-1]}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.headline}\n{self.scope}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values for JSON; samples thinned out."""
        step = -(-len(self.samples) // _MOST_SAMPLES)
        found, interval, visible = self.trend, None, None
        if found.verdict != SHORT:  # else they have no end, and JSON no infinity
            interval, visible = [found.low / 1e6, found.high / 1e6], found.visible / 1e6
        return {
            "version": __version__, "model": self.model, "place": self.place,
            "minutes": self.minutes, "seconds": self.seconds, "turns": self.turns,
            "conversations": self.conversations, "ended": self.ended,
            "verdict": found.verdict, "mb_per_turn": found.slope / 1e6,
            "mb_per_turn_interval": interval, "mb_per_turn_visible": visible,
            "mb_per_conversation": found.slope * self.turns / self.conversations / 1e6,
            **self.held, "samples": self.samples[::step],
        }  # fmt: skip

    def to_table(self) -> RenderableType:
        """For a terminal of 80 columns."""
        from rich.console import Group
        from rich.text import Text

        from gemma_multi.terminal import facts_table

        colour = {FLAT: "green", GROWS: "red"}.get(self.trend.verdict, "yellow")
        return Group(
            Text(self.scope, style="dim"), Text(self.headline, style=colour),
            *([Text(self.details)] if self.details else []), facts_table(self.held),
        )  # fmt: skip

    def save(self, directory: str | Path) -> Path:
        """Writes `soak.json` and `soak.html` to a new directory."""
        from gemma_multi.benchmarking.page import soak_page, write

        return write(Path(directory), "soak", soak_page(self), self.to_dict())


def _mb(value: float) -> str:
    return f"{round(value / 1e6, 3) + 0.0:.3f}"  # no -0.000
