"""run: a file of rows in, a file of answers out.

One call's way through this package: `source` reads the input through, `parts` says what an earlier
run left, an engine (this process, or `on_ray`) answers the parts that are missing with `answers`,
and `output` puts all of them together.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_multi import __version__
from gemma_multi.batch import on_ray
from gemma_multi.batch.answers import Answering, Work, check_task, columns_of, rows_per_part
from gemma_multi.batch.kinds import as_line, plain
from gemma_multi.batch.options import BatchOptions, BatchReport, RayOptions
from gemma_multi.batch.output import Output
from gemma_multi.batch.parts import Parts
from gemma_multi.batch.source import Input, Missing, read_through
from gemma_multi.checkpoint.tensors import Tensors
from gemma_multi.constraints.schema import read_schema
from gemma_multi.errors import BatchError, BatchStopped, GemmaError, OptionError
from gemma_multi.files import locked
from gemma_multi.formats.peft import read_adapter
from gemma_multi.model import Model
from gemma_multi.options import checked
from gemma_multi.progress import Progress, reporting
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.tools import read_tools

Advance = Callable[[int], None]  # so many more rows are done
Answered = Generator[tuple[int, bytes], None, None]  # parts, as they are done
Engine = Callable[[Missing, Advance], Answered]


def run(
    model: Source, input: str | Path, output: str | Path, task: str = "generate", *,
    load: Mapping[str, Any] | None = None, progress: Progress = True, **options: Any,
) -> BatchReport:  # fmt: skip
    """Asks `model` every row of `input` and writes the answers to `output`, in the same order.

    model, load: a loaded Model, or what `gemma_multi.load` takes, and `load` what else it takes:
        `{"backend": "keras"}`.
    input, output: .jsonl, .csv or .parquet, each by its own name.
    task: "generate", "classify", "route", "extract" or "embed".
    progress: True for a bar on a terminal, False for none, or a function of (done, total) rows.
    options: those of `BatchOptions` (`column`, `key`, `keep`, `resume`, ...), with `engine="ray"`
        those of `RayOptions`, and the task's own, as `Model.batch` takes them.

    An answer stands with its row's number from 0, or its key. Rows that fail go to a file of their
    own. Raises OptionError and DataError for what is wrong with all of it, before any row is
    asked; BatchError for an unfinished run that this one cannot go on with; BatchStopped on Ctrl-C,
    after which `resume=True` goes on; and what `load` raises.
    """
    started = time.perf_counter()
    settings, ray, own = _split(task, options)
    files = Output(Path(output), Path(input), settings)
    parts = Parts(files.path)
    goes_on = settings.resume and parts.begun
    if not goes_on:
        files.check_free()
        if parts.begun and not settings.overwrite:
            raise BatchError(
                f"{parts.folder}: an unfinished run is there; go on with it (--resume) or begin "
                "again (--overwrite)"
            )
    files.path.parent.mkdir(parents=True, exist_ok=True)
    lock = files.path.with_name(f".{files.path.name}.lock")
    with locked(lock, f"{files.path}: another process is writing it", BatchError):
        drawn = parts.manifest().get("seed", 0) if goes_on else secrets.randbits(32)
        seed = drawn if settings.seed is None else settings.seed
        work = Work(model, task, own, dict(load or {}), seed)
        with reporting(progress, "reading") as report:
            source = read_through(Path(input), settings.column, settings.carried, report)
        kinds = files.kinds(source, columns_of(work))
        per_part = settings.rows_per_part or rows_per_part(task)
        facts = {**_facts(work, source, per_part), **_weights(work)}
        if goes_on:
            parts.check(facts)
        engine = _engine(work, ray)
        if not goes_on:
            parts.begin(facts)
        missing = Missing(source, per_part, frozenset(parts.done()))
        if goes_on and missing.left:
            files.check_free()
        try:
            with reporting(progress, task, unit="rows") as report:
                _ask(engine, missing, parts, report)
            failed = files.write(parts, source, kinds)
        except KeyboardInterrupt:
            raise _stopped(files.path, parts, missing) from None
        except GemmaError:
            if not parts.done():
                parts.remove()
            raise
        parts.remove()
    return BatchReport(
        files.path, files.errors if failed else None, source.rows, failed,
        source.rows - missing.left, time.perf_counter() - started, seed,
    )  # fmt: skip


def _stopped(output: Path, parts: Parts, missing: Missing) -> BatchStopped:
    """What is said on Ctrl-C."""
    rows = missing.source.rows
    if not parts.done():
        parts.remove()
        return BatchStopped(
            f"{output}: stopped before the first {min(missing.rows_per_part, rows):,} rows were "
            "done; nothing is kept"
        )
    done = rows - replace(missing, done=parts.done()).left
    return BatchStopped(
        f"{output}: stopped; {done:,} of {rows:,} rows are done and kept, and --resume goes on"
    )


def _engine(work: Work, ray: RayOptions | None) -> Engine:
    """What answers the parts that are missing. Raises what is wrong with model and options as far
    as it can be known in this process."""
    if ray is None:
        return partial(_in_this_process, Answering(work))
    on_ray.import_ray()
    return partial(on_ray.answered, on_ray.anywhere(work), ray)


def _ask(
    engine: Engine, missing: Missing, parts: Parts, report: Callable[[int, int], None]
) -> None:
    """Has the missing parts answered, each kept as soon as it is there."""
    total = missing.source.rows
    done = total - missing.left

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        report(done, total)

    advance(0)
    if missing.left:
        with closing(engine(missing, advance)) as answered:
            for number, lines in answered:
                parts.write(number, lines)


def _in_this_process(answering: Answering, missing: Missing, advance: Advance) -> Answered:
    for number, asked in missing:
        lines = []
        for answer in answering(asked):
            lines.append(as_line(answer))
            advance(1)
        yield number, b"".join(lines)


def _split(
    task: str, options: dict[str, Any]
) -> tuple[BatchOptions, RayOptions | None, dict[str, Any]]:
    """Options by whose they are: the batch's, Ray's where it is the engine, the task's."""
    check_task(task)
    names = {field.name for field in fields(BatchOptions)}
    settings = checked(BatchOptions, {n: v for n, v in options.items() if n in names})
    of_ray = {field.name for field in fields(RayOptions)}
    given = {n: v for n, v in options.items() if n in of_ray}
    if given and settings.engine != "ray":
        raise OptionError(f"{next(iter(given))!r} is an option of --engine ray")
    own = {n: v for n, v in options.items() if n not in names | of_ray}
    if own.get("logprobs") is not None:
        raise OptionError("a batch has no column for logprobs; `Model.batch` gives them")
    return settings, checked(RayOptions, given) if settings.engine == "ray" else None, own


def _facts(work: Work, source: Input, per_part: int) -> dict[str, Any]:
    """What must be the same for a run to be resumed, beside the weights."""
    options = dict(work.options)
    if options.get("schema") is not None:
        options["schema"] = read_schema(options["schema"])[0]
    if options.get("tools") is not None:
        options["tools"] = [
            [one.name, one.description, one.parameters] for one in read_tools(options["tools"])
        ]
    return {
        "version": __version__, "task": work.task, "options": plain(options), "seed": work.seed,
        "column": source.column, "rows": source.rows, "rows_per_part": per_part,
        "input_sha256": source.sha256,
    }  # fmt: skip


def _weights(work: Work) -> dict[str, Any]:
    """Who answers: hashes of what is loaded, and where it runs."""
    if isinstance(work.model, Model):
        engine = work.model.engine
        return {
            "weights_sha256": work.model.checkpoint.digest(),
            "backend": engine.name, "precision": engine.precision,
            "context_length": work.model.context_length,
        }  # fmt: skip
    place = work.place
    opening = {n: place[n] for n in ("revision", "local_files_only", "progress") if n in place}
    checkpoint = open_checkpoint(work.model, **opening)
    facts: dict[str, Any] = {"weights_sha256": checkpoint.digest()}
    if (adapter := place.get("adapter")) is not None:
        changes = read_adapter(adapter, checkpoint.config).tensors
        named = {
            f"{n}.{which}": pair[i] for n, pair in changes.items() for i, which in enumerate("AB")
        }
        facts["adapter_sha256"] = Tensors.of(named).digest
    for name, default in (("backend", "auto"), ("precision", "auto"), ("context_length", None)):
        facts[name] = place.get(name, default)
    return facts
