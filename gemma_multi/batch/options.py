"""What a batch may be told, and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_multi.errors import OptionError
from gemma_multi.options import option

ENGINES = ("local", "ray")
_MOST_PER_PART = 100_000


@dataclass(frozen=True)
class BatchOptions:
    """Of every batch. What a field means stands beside it."""

    column: str | None = option(
        None, "The column that holds what is asked; prompt, messages, text or query if unset."
    )
    key: str | None = option(
        None, "A column that tells rows apart; it goes into the output in place of their numbers."
    )
    keep: Sequence[str] = option((), "A column to carry into the output; may be repeated.")
    errors: str | None = option(
        None, "Where rows that failed go; OUTPUT's name with .errors.jsonl if unset."
    )
    resume: bool = option(False, "Go on with what an earlier run left beside OUTPUT.")
    overwrite: bool = option(False, "Replace OUTPUT, and what an unfinished run left, if there.")
    rows_per_part: int | None = option(
        None, "Rows that are kept together: what a kill loses at most; 256 where texts are "
        "written, 1024 of quicker tasks if unset."
    )  # fmt: skip
    seed: int | None = option(
        None, "Of the first row, where tokens are drawn; each later row has one more. Drawn if "
        "unset, and remembered by --resume."
    )  # fmt: skip
    engine: str = option("local", "local (this process) or ray.")

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"engine is {self.engine!r}, expected {' or '.join(ENGINES)}")
        if isinstance(self.keep, str) or not all(isinstance(one, str) for one in self.keep):
            raise OptionError(f"keep is {self.keep!r}, expected names of columns")
        if self.rows_per_part is not None:
            _whole("rows_per_part", self.rows_per_part, 1, _MOST_PER_PART)
        if self.seed is not None:
            _whole("seed", self.seed, 0, (1 << 32) - 1)
        if len(set(self.carried)) < len(self.carried):
            raise OptionError(f"a column is carried twice: {', '.join(self.carried)}")

    @property
    def carried(self) -> tuple[str, ...]:
        """The columns of the input that go into the output."""
        return (*(() if self.key is None else (self.key,)), *self.keep)


@dataclass(frozen=True)
class RayOptions:
    """Of a batch on Ray. What a field means stands beside it."""

    address: str | None = option(
        None, "Ray: a cluster's address, or auto; one on this machine if unset."
    )
    actors: int = option(2, "Ray: processes, each with a loaded model.")
    cpus: float = option(1.0, "Ray: processor cores of each.")
    gpus: float = option(0.0, "Ray: GPUs of each.")

    def __post_init__(self) -> None:
        _whole("actors", self.actors, 1, 10_000)
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise OptionError(f"{name} is {value!r}, expected a number of at least 0")
        if self.address is not None and self.address.startswith("ray://"):
            raise OptionError(
                f"address is {self.address!r}, of a client; run this on a node of the cluster, "
                "with --address auto"
            )


@dataclass(frozen=True)
class BatchReport:
    """What became of a file of rows."""

    output: Path
    errors: Path | None  # where the rows that failed are; None where none did
    rows: int  # of the input
    failed: int  # of them
    resumed: int  # of them, answered by an earlier run
    seconds: float  # of this run, with loading
    seed: int  # of the first row, where tokens are drawn

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        paths = {"output": str(self.output), "errors": self.errors and str(self.errors)}
        return {**asdict(self), **paths}

    def __str__(self) -> str:
        asked = self.rows - self.resumed
        told = f"{self.output}: {self.rows:,} rows, {asked:,} of them in {self.seconds:,.1f} s"
        if self.failed:
            told += f"; {self.failed:,} failed, see {self.errors}"
        return told


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise OptionError(f"{name} is {value!r}, expected a whole number {least} to {most:,}")
