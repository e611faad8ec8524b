"""Ray Data as the engine: parts stream through a pool of actors, each with a loaded model.

Design choices:
- Ray decides who does what and when, starts an actor again that was killed and gives its part to
  it or to another. Here is only what goes in (a part a row) and what comes out (its answers).
- The input is read by one streaming task on the machine that asks, and the answers are kept there,
  so a cluster needs no disk in common for them. The model is loaded on each actor's own machine: a
  hub id, or a path that is the same everywhere.
- What is wrong with a model or an option is found where the model is loaded. The actor says so in
  its answer: an exception there would be tried again, and come back as a page of Ray's frames.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gemma_multi.batch.answers import Answering, Work, check_task, columns_of
from gemma_multi.batch.kinds import TEXT, arrow_schema, as_line, for_arrow
from gemma_multi.batch.options import RayOptions
from gemma_multi.batch.source import AskedRow, Missing
from gemma_multi.engines import choose_backend
from gemma_multi.errors import BackendError, BatchError, GemmaError
from gemma_multi.machine import available_cores
from gemma_multi.sources import open_checkpoint

_NO_RAY = "ray is not installed: pip install 'gemma-multi[ray]'"


def answered(
    work: Work, options: RayOptions, missing: Missing, advance: Callable[[int], None]
) -> Generator[tuple[int, bytes], None, None]:
    """(number, answers) of each part, as they are done. Raises BackendError where there is no Ray
    or no cluster, and what the actors' models raise."""
    with _cluster(options) as ray:
        here = {f"node:{ray.util.get_node_ip_address()}": 0.001}
        # of a dataset with one row, which nobody reads, one task makes all the parts
        parts = ray.data.from_items([0]).map_batches(
            _parts, fn_kwargs={"missing": missing}, batch_size=1, num_cpus=0, resources=here
        )
        answers = parts.map_batches(
            _Actor, fn_constructor_kwargs={"work": work, "cpus": options.cpus},
            batch_size=1, compute=ray.data.ActorPoolStrategy(size=options.actors),
            num_cpus=options.cpus, num_gpus=options.gpus or None,
        )  # fmt: skip
        try:
            for part in answers.iter_rows():
                if part["failure"]:
                    raise pickle.loads(part["failure"])
                advance(part["rows"])
                yield int(part["number"]), part["lines"]
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise BatchError(
                f"Ray could not go on: {last}; what is done is kept, and --resume goes on"
            ) from error


def ray_processor(
    model: str = "storyteller", task: str = "generate", *, column: str = "prompt",
    load: Mapping[str, Any] | None = None, actors: int = 2, cpus: float = 1, gpus: float = 0,
    rows_at_a_time: int = 256, **options: Any,
) -> Callable[[Any], Any]:  # fmt: skip
    """A step of a pipeline of Ray Data: a function that takes a Dataset and gives one with the
    task's columns beside its own, and `error` where a row failed.

    >>> ask = ray_processor("storyteller", "classify", column="text", labels=["good", "bad"])
    >>> ask(ray.data.read_parquet("reviews/")).write_parquet("judged/")

    model, load: what `gemma_multi.load` takes, on each actor's machine.
    column: the one that holds what is asked.
    actors, cpus, gpus: how many, and what each has; see `RayOptions`.
    rows_at_a_time: that an actor takes.
    options: the task's own, as `Model.batch` takes them.

    Raises OptionError for an unknown task or a bad number, BackendError where Ray is not installed.
    """
    check_task(task)
    pool = RayOptions(None, actors, cpus, gpus)
    work = anywhere(Work(model, task, options, dict(load or {})))
    ray = import_ray()

    def process(dataset: Any) -> Any:
        return dataset.map_batches(
            _Processor, batch_format="pyarrow", batch_size=rows_at_a_time,
            fn_constructor_kwargs={"work": work, "cpus": cpus, "column": column},
            compute=ray.data.ActorPoolStrategy(size=pool.actors), num_cpus=cpus,
            num_gpus=gpus or None,
        )  # fmt: skip

    return process


def _parts(batch: Any, missing: Missing) -> Iterator[dict[str, list[Any]]]:
    """Each part as a row of its own."""
    for number, asked in missing:
        yield {"number": [number], "asked": [pickle.dumps(asked)]}


class _Actor:
    """A loaded model that answers parts."""

    def __init__(self, work: Work, cpus: float) -> None:
        self._failure, self._answering = b"", None
        try:
            self._answering = Answering(_within(work, cpus))
        except GemmaError as error:
            self._failure = pickle.dumps(type(error)(*error.args))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        asked, lines = pickle.loads(batch["asked"][0]), b""
        if self._answering is not None:
            lines = b"".join(map(as_line, self._answering(asked)))
        return {
            "number": [batch["number"][0]], "rows": [len(asked)], "lines": [lines],
            "failure": [self._failure],
        }  # fmt: skip


class _Processor:
    """A loaded model that adds columns to tables."""

    def __init__(self, work: Work, cpus: float, column: str) -> None:
        self._column = column
        self._kinds = {**columns_of(work), "error": TEXT}
        self._answering = Answering(_within(work, cpus))

    def __call__(self, table: Any) -> Any:
        import pyarrow

        asked = [AskedRow(i, item) for i, item in enumerate(table[self._column].to_pylist())]
        answers = [
            {name: for_arrow(answer.get(name), kind) for name, kind in self._kinds.items()}
            for answer in self._answering(asked)
        ]
        found = pyarrow.Table.from_pylist(answers, arrow_schema(self._kinds))
        for name in found.column_names:
            table = table.append_column(name, found[name])
        return table


def _within(work: Work, cpus: float) -> Work:
    """The same on an actor's share of the cores, where the backend takes a number of threads."""
    place = work.place
    checkpoint = open_checkpoint(
        work.model, revision=place.get("revision"), progress=False,
        local_files_only=place.get("local_files_only", False),
    )  # fmt: skip
    backend = choose_backend(
        place.get("backend", "auto"), checkpoint, place.get("precision", "auto")
    )
    its = {field.name for field in fields(backend.options)}
    share = {"threads": max(1, math.floor(cpus))} if "threads" in its else {}
    return replace(work, place={"progress": False, **share, **place})


def anywhere(work: Work) -> Work:
    """The same for a process that stands in another directory. Raises BatchError for a model that
    is loaded here already."""
    model, place = work.model, dict(work.place)
    if not isinstance(model, str | Path):
        raise BatchError(
            f"model is a loaded {type(model).__name__}, and each actor loads its own; give its "
            "path or hub id"
        )
    if Path(model).exists() and model != "storyteller":
        model = Path(model).absolute()
    if isinstance(place.get("adapter"), str | Path):
        place["adapter"] = Path(place["adapter"]).absolute()
    return replace(work, model=model, place=place)


def import_ray() -> Any:
    """Raises BackendError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would be sent elsewhere
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendError(f"{_NO_RAY} ({error})") from None
    return ray


@contextmanager
def _cluster(options: RayOptions) -> Iterator[Any]:
    """Ray, connected: to what this process is connected to already, to the cluster at an address,
    or to one of this machine, which ends with the block."""
    ray = import_ray()
    ours = not ray.is_initialized()
    if ours:
        where: dict[str, Any] = {"address": options.address}
        if options.address is None:
            # room for all, since Ray waits without end for cores that there are not; and one of its
            # own, also where a cluster of somebody else runs on this machine
            cores = max(available_cores(), math.ceil(options.actors * options.cpus))
            where = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        _check_reachable(options.address)
        try:
            ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            place = options.address or "this machine"
            raise BackendError(f"there is no Ray cluster at {place}: {error}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.target_max_block_size
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a part is a block: else many would wait for one actor
    try:
        yield ray
    finally:
        context.enable_progress_bars, context.target_max_block_size = before
        if ours:
            ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raises BackendError where nothing listens; Ray itself would try for most of a minute."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), 10).close()
        except (OSError, OverflowError) as error:
            raise BackendError(f"there is no Ray cluster at {address}: {error}") from None
