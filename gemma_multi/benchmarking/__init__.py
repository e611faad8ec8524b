"""`bench`: how fast, how large and how thirsty a model is here; `soak`: whether memory stays flat.

One call's way through this package: `places` says which backends, precisions and devices are asked
for, each is measured in processes of its own (`measuring`, over `workload`, `traffic` and `energy`;
`soaking`), and `report` and `soak_report`, with `page`, are what people read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_multi import own_process
from gemma_multi.benchmarking.places import BenchPlace, all_places, check_memory, check_places
from gemma_multi.benchmarking.report import BenchReport, Measured
from gemma_multi.benchmarking.soak_report import STOPPED, SoakReport
from gemma_multi.benchmarking.workload import COUNT
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import check_context_length
from gemma_multi.errors import BackendError, GemmaError, OptionError
from gemma_multi.progress import Progress, Report, reporting
from gemma_multi.sources import open_checkpoint

__all__ = ["BenchReport", "SoakReport", "bench", "soak"]

CONTEXT = 2048  # tokens, which the longest conversation fits in
_MOST_CONVERSATIONS, _MOST_ROUNDS, _MOST_MINUTES = 10_000, 100, 7 * 24 * 60


def bench(
    model: str | Path,
    *,
    backends: Sequence[str] | None = None,
    precisions: Sequence[str] = ("auto",),
    devices: Sequence[str] = ("auto",),
    rounds: int = 3,
    conversations: int = COUNT,
    context_length: int | None = None,
    powermetrics: bool = False,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **backend_options: Any,
) -> BenchReport:
    """Measures `model` on this machine: each backend in each precision on each device.

    model, revision, local_files_only: a name, a path or an id, as `open_checkpoint` takes them.
    backends: all that are for more than comparison if None.
    precisions: "float32", "bfloat16", "float16", "sfp8", "int4", "int8", or "auto" as `load` does.
    devices: "cpu", "gpu", or "auto": what a backend takes by itself.
    rounds: how often each is measured, in turn, in a new process every time; medians count.
    conversations: how many of the 25 of `benchmarking.workload`.
    context_length: tokens that a session holds; 2,048 if None, or all the model has.
    powermetrics: permits `sudo -n powermetrics`, which counts joules on macOS.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).
    backend_options: the backends' own, such as LiteRT's `threads`, for those that have them.

    What cannot run here is in the report with its reason. Raises BackendError where nothing can,
    OptionError for a name or number that is none, and what `open_checkpoint` raises.
    """
    _check_name(model)
    _check_count("rounds", rounds, _MOST_ROUNDS)
    _check_count("conversations", conversations, _MOST_CONVERSATIONS)
    asked = all_places(backends, precisions, devices)
    check_places(asked, backend_options)
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    source = {"model": str(model), "revision": revision, "local_files_only": local_files_only,
              "context_length": _context(context_length, checkpoint)}  # fmt: skip
    measured = {place: Measured(place) for place in dict.fromkeys(p.of(checkpoint) for p in asked)}
    with reporting(progress, "measuring") as report:
        for i in range(rounds):
            for j, (place, found) in enumerate(measured.items()):
                if found.reason:
                    continue
                try:
                    check_memory(place, checkpoint)
                    job = {
                        "load": place.job(backend_options, source), "device": place.device,
                        "conversations": conversations, "powermetrics": powermetrics,
                    }  # fmt: skip
                    heard = _in_all(report, i * len(measured) + j, rounds * len(measured))
                    facts = own_process.ask(_MEASURING, job, heard, f"measured {place}")
                    found.rounds.append(facts)
                except GemmaError as error:
                    found.reason = str(error)
    if not any(found.rounds for found in measured.values()):
        told = "; ".join(f"{place}: {found.reason}" for place, found in measured.items())
        raise BackendError(f"nothing of what was asked for can run here: {told}")
    return BenchReport.of(
        str(model), checkpoint.path, list(measured.values()), conversations, rounds
    )


def soak(
    model: str | Path,
    minutes: float = 60,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    context_length: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **backend_options: Any,
) -> SoakReport:
    """Converses with `model` for so many minutes, in a process of its own, and says whether its
    memory stays flat: see `benchmarking.trend`.

    Ctrl-C ends it early, and the report is of what was seen. What is not said here is as in `bench`
    and `load`. Raises OptionError, BackendError where the process ends by itself before there is
    anything to report, and what `open_checkpoint` raises.
    """
    _check_name(model)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or (
        not 0 < minutes <= _MOST_MINUTES
    ):  # fmt: skip
        raise OptionError(f"minutes is {minutes!r}, expected more than 0, at most {_MOST_MINUTES}")
    place = BenchPlace(backend, precision, device)
    check_places([place], backend_options)
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    place = place.of(checkpoint)
    check_memory(place, checkpoint)
    source = {"model": str(model), "revision": revision, "local_files_only": local_files_only,
              "context_length": _context(context_length, checkpoint)}  # fmt: skip
    job = {"load": place.job(backend_options, source), "device": place.device, "minutes": minutes}
    found = SoakReport(str(model), minutes)
    with reporting(progress, "conversing") as report:

        def hear(told: Mapping[str, Any]) -> None:
            found.hear(told)
            report(round(found.seconds), round(60 * minutes))

        try:
            own_process.ask(_SOAKING, job, hear, f"conversed on {place}")
        except KeyboardInterrupt:
            if not found.samples:
                raise
            found.ended = STOPPED
        except GemmaError as error:
            if not found.samples:
                raise
            found.ended = str(error)
    return found


_MEASURING, _SOAKING = f"{__name__}.measuring", f"{__name__}.soaking"


def _in_all(report: Report, before: int, count: int) -> Callable[[Mapping[str, Any]], None]:
    """What hears how far one process is, of so many."""
    return lambda told: report(
        round(1000 * (before + told["done"] / told["of"])), 1000 * count
    )  # fmt: skip


def _context(asked: int | None, checkpoint: Checkpoint) -> int:
    most = checkpoint.context_length
    return min(CONTEXT, most) if asked is None else check_context_length(asked, most)


def _check_name(model: object) -> None:
    if not isinstance(model, str | Path):
        raise OptionError(
            f"model is a {type(model).__name__}, expected a name or a path: it is loaded anew, in "
            "processes of its own"
        )


def _check_count(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise OptionError(f"{name} is {value!r}, expected a whole number from 1 to {most:,}")
