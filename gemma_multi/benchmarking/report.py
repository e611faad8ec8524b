"""BenchReport: medians of what was measured, and what could not be; for a terminal, as JSON, as a
page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_multi import __version__
from gemma_multi.benchmarking.places import BenchPlace
from gemma_multi.files import size_on_disk
from gemma_multi.machine import Machine, look_at_the_machine

if TYPE_CHECKING:
    from rich.console import RenderableType

SPEEDS = ["", "prefill/s", "decode/s", "bound", "first, ms", "load, s", "peak, MB"]
USE = ["", "time, s", "written/s", "p95, ms", "CPU, s", "moved, GB", "joules"]


@dataclass(frozen=True)
class Figure:
    """A median, and the lowest and highest of its rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        return cls(statistics.median(values), min(values), max(values))

    def shown(self, form: str = ",.0f", scale: float = 1) -> str:
        """With half of its range in a line below, where it has one."""
        away = (self.high - self.low) / 2 / self.median if self.median else 0.0
        spread = f"\n±{away:.0%}" if away >= 0.005 else ""
        return f"{format(self.median * scale, form)}{spread}"


@dataclass
class Measured:
    """What one place gave; `reason` says why it gave nothing, or nothing more."""

    place: BenchPlace
    rounds: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""

    @property
    def name(self) -> str:
        """What it turned out to be."""
        if not self.rounds:
            return str(self.place)
        found = self.rounds[0]["place"]
        return f"{found['backend']} {found['weights']} {found['device']}"

    def figure(self, name: str) -> Figure | None:
        """None where the machine does not say."""
        values = [found[name] for found in self.rounds]
        return None if None in values else Figure.of(values)

    def to_dict(self) -> dict[str, Any]:
        figures = {
            name: figure and asdict(figure)
            for name, value in (self.rounds[0] if self.rounds else {}).items()
            if isinstance(value, float | int | None)
            for figure in [self.figure(name)]
        }
        return {"asked": asdict(self.place), "name": self.name, "reason": self.reason,
                "figures": figures, "rounds": self.rounds}  # fmt: skip


@dataclass(frozen=True)
class BenchReport:
    """One model in several places on one machine."""

    model: str  # as it was asked for
    disk_bytes: int | None  # of its directory or file
    machine: Machine
    measured: tuple[Measured, ...]
    conversations: int
    rounds: int

    @classmethod
    def of(
        cls, model: str, path: Path | None, measured: Sequence[Measured], conversations: int,
        rounds: int,
    ) -> BenchReport:  # fmt: skip
        """`path` is where its files are."""
        size = size_on_disk(path) if path is not None else None
        return cls(model, size, look_at_the_machine(), tuple(measured), conversations, rounds)

    @property
    def ran(self) -> list[Measured]:
        return [one for one in self.measured if one.rounds]

    @property
    def headline(self) -> str:
        """The fastest at writing."""
        speeds = [
            (statistics.median(each["decode_tokens_per_second"] for each in one.rounds), one.name)
            for one in self.ran
        ]
        best, name = max(speeds)
        return f"{Path(self.model).name}: {best:,.0f} tokens/s on {name}"

    @property
    def scope(self) -> str:
        machine, size = self.machine, self.disk_bytes
        disk = f", {size / 1e6:,.1f} MB on disk" if size else ""
        return (
            f"{self.model}{disk}; {machine.system}, {machine.cores} cores, memory read at "
            f"{machine.bytes_per_second / 1e9:.0f} GB/s; medians of {self.rounds} "
            f"round{'s'[: self.rounds > 1]}, ± half of their range"
        )

    @property
    def speed_rows(self) -> list[list[str]]:
        """Of `SPEEDS`."""
        rows = []
        for one in self.ran:
            bound = self.share_of_bound(one)
            rows.append([
                one.name, _shown(one, "prefill_tokens_per_second"),
                _shown(one, "decode_tokens_per_second"), "-" if bound is None else f"{bound:.0%}",
                _shown(one, "first_token_seconds", ",.1f", 1e3),
                _shown(one, "load_seconds", ",.2f"),
                _shown(one, "peak_memory_bytes", ",.0f", 1e-6),
            ])  # fmt: skip
        return rows

    @property
    def use_rows(self) -> list[list[str]]:
        """Of `USE`: what the conversations took."""
        return [[
            one.name, _shown(one, "conversations_seconds", ",.1f"),
            _shown(one, "written_tokens_per_second"),
            _shown(one, "wait_p95_seconds", ",.0f", 1e3),
            _shown(one, "cpu_seconds", ",.1f"),
            _shown(one, "bytes_moved", ",.2f", 1e-9),
            _shown(one, "joules"),
        ] for one in self.ran]  # fmt: skip

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of the figures."""
        first = self.ran[0].rounds[0]
        energies = dict.fromkeys(found["energy"] for one in self.ran for found in one.rounds)
        counted = "Energy" if first["joules"] is not None else "No energy was measured"
        turns = "conversation" if self.conversations == 1 else "conversations"
        return [
            f"prefill: {first['prompt']} tokens read at once; decode: {first['steps']} greedy "
            "steps behind them. bound: decode as a share of what memory's speed allows, if a step "
            "reads every weight and its cache once. first: to the first token of `generate`.",
            f"{self.conversations} {turns} of fixed lengths. p95: the wait for the first token of "
            "a turn; CPU: of all cores together; moved: at least, by shapes and types.",
            f"{counted}: {'; '.join(energies)}.",
        ]

    @property
    def absent(self) -> list[tuple[str, str]]:
        """(name, reason) of what did not run, or not in all rounds."""
        return [
            (one.name, f"only {len(one.rounds)} of {self.rounds} rounds: " * bool(one.rounds)
             + one.reason)
            for one in self.measured if one.reason
        ]  # fmt: skip

    def share_of_bound(self, one: Measured) -> float | None:
        """Of the tokens a second that memory's speed allows; None on a GPU, which has its own."""
        decode, step = one.figure("decode_tokens_per_second"), one.figure("decode_step_bytes")
        if one.rounds[0]["place"]["device"] != "cpu" or decode is None or step is None:
            return None
        return decode.median * step.median / self.machine.bytes_per_second

    def __str__(self) -> str:
        return f"{self.headline}\n{self.scope}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values for JSON."""
        return {
            "version": __version__, "model": self.model, "disk_bytes": self.disk_bytes,
            "machine": asdict(self.machine), "conversations": self.conversations,
            "measured": [one.to_dict() for one in self.measured],
        }  # fmt: skip

    def to_table(self) -> RenderableType:
        """For a terminal of 80 columns."""
        from rich.console import Group
        from rich.text import Text

        from gemma_multi.terminal import plain_table

        absent = [
            Text(f"did not run: {name}: {reason}", style="red") for name, reason in self.absent
        ]
        notes = [Text(note, style="dim") for note in self.notes]
        return Group(
            Text(self.scope, style="dim"), Text(), plain_table(SPEEDS, self.speed_rows), Text(),
            plain_table(USE, self.use_rows), Text(), *absent, *notes,
        )  # fmt: skip

    def save(self, directory: str | Path) -> Path:
        """Writes `bench.json` and `bench.html` to a new directory."""
        from gemma_multi.benchmarking.page import bench_page, write

        return write(Path(directory), "bench", bench_page(self), self.to_dict())


def _shown(one: Measured, name: str, form: str = ",.0f", scale: float = 1) -> str:
    figure = one.figure(name)
    return "-" if figure is None else figure.shown(form, scale)
