"""Rows through files, against `model.batch` in memory; and memory over a million rows.

    python benchmarks/file_batches.py [--model storyteller] [--backend litert] [--rows 512]
        [--rounds 5] [--memory-rows 1000000] [--json results.json]

Rows per second: texts of 40 tokens (beginnings of the Brown corpus) into two labels, on one
process. `gemma_multi.batch.run` reads them from JSONL and writes JSONL, with everything that this
takes (hash of the input, parts forced to the disk, joining); beside it `model.batch` has them in a
list. Both have the model loaded, and take turns. The bundled model is the hard case: the quicker
the model, the more the files weigh.

Memory: as many rows as asked for, of which every tenth has two words, which the bundled model's
first layer alone puts into one of two classes; the others are empty and go to the file of errors,
since a million answers would take hours and no other memory. The resident memory of the process is
read on the way. What would grow with rows, answers, errors or parts grows there as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from side_by_side import columns, seconds

import gemma_multi
from gemma_multi import batch
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.tensors import Tensors

TOKENS = 40  # of a text
LABELS = ["news", "fiction"]
SHOWN = 10  # readings of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="storyteller", help="or gemma, the real 270M")
    parser.add_argument("--backend", default="litert")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            found["speed"] = speed(options, Path(folder))
        if options.memory_rows:
            found["memory"] = memory(options.memory_rows, Path(folder))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    name, rows, rounds = options.model, options.rows, options.rounds
    model = gemma_multi.load(
        gemma_270m() if name == "gemma" else name, backend=options.backend, context_length=256,
        progress=False,
    )  # fmt: skip
    texts = beginnings(model, rows)
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def through_files() -> None:
        batch.run(model, source, folder / "found.jsonl", "classify", labels=LABELS, overwrite=True,
                  progress=False)  # fmt: skip

    def in_memory() -> None:
        done = model.batch(texts, "classify", labels=LABELS, progress=False)
        assert all(row.error is None for row in done)

    files, plain = seconds(through_files, in_memory, runs=rounds)
    files_cpu, plain_cpu = (processor_seconds(way, rounds) for way in (through_files, in_memory))
    return {
        "model": name, "backend": options.backend, "rows": rows, "tokens": TOKENS,
        "files_rows_per_second": rows / files, "rows_per_second": rows / plain,
        "ratio": plain / files, "cpu_ratio": plain_cpu / files_cpu,
    }  # fmt: skip


def processor_seconds(way: Callable[[], None], rounds: int) -> float:
    """The median of the time that processors spend on it, which other work disturbs less."""
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        way()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def beginnings(model: gemma_multi.Model, count: int) -> list[str]:
    """Different texts of `TOKENS` tokens."""
    found: list[str] = []
    for document in brown_documents():
        ids = model.tokenizer.encode(document)
        for start in range(0, len(ids) - TOKENS, TOKENS):
            if len(found) == count:
                return found
            found.append(model.tokenizer.decode(ids[start : start + TOKENS]))
    return found


def memory(rows: int, folder: Path) -> dict[str, Any]:
    model = gemma_multi.load(one_layer(), backend="litert", context_length=64, threads=1,
                             progress=False)  # fmt: skip
    source = folder / "many.jsonl"
    with source.open("w") as file:
        for i in range(rows):
            file.write(json.dumps({"id": i, "text": "" if i % 10 else f"row {i}"}) + "\n")
    readings: dict[int, float] = {}
    started = time.perf_counter()

    def watch(done: int, total: int) -> None:
        if total and done * SHOWN // total > len(readings):
            readings[done] = resident_mb()

    report = batch.run(
        model, source, folder / "many.parquet", "classify", labels=["A", "B"],
        instruction="Which?", raw=True, key="id", progress=watch,
    )  # fmt: skip
    assert (report.rows, report.failed) == (rows, rows - len(range(0, rows, 10)))
    return {
        "rows": rows, "seconds": time.perf_counter() - started, "input_mb": size_mb(source),
        "output_mb": size_mb(report.output), "resident_mb": readings,
        "resident_mb_at_the_end": resident_mb(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }  # fmt: skip


def one_layer() -> Checkpoint:
    """The bundled model's first layer, with its embedding and last norm."""
    whole = gemma_multi.open_checkpoint("storyteller")
    config = dataclasses.replace(
        whole.config, num_hidden_layers=1, layer_types=("full_attention",)
    )  # fmt: skip
    tensors = {name: whole.tensors[name] for name in config.tensor_shapes()}
    return Checkpoint(config, Tensors.of(tensors), make_tokenizer=lambda: whole.tokenizer)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def size_mb(path: Path) -> float:
    return path.stat().st_size / 1e6


def show(found: dict[str, Any]) -> None:
    if one := found.get("speed"):
        table = columns(("model",), ("through files", "model.batch", "ratio", "of processor time"))
        table.add_row(
            f"{one['model']}, {one['backend']}", f"{one['files_rows_per_second']:.1f} rows/s",
            f"{one['rows_per_second']:.1f} rows/s", f"{one['ratio']:.3f}",
            f"{one['cpu_ratio']:.3f}",
        )  # fmt: skip
        Console().print(table)
    if one := found.get("memory"):
        table = columns((), ("rows done", "resident memory"))
        for rows, resident in one["resident_mb"].items():
            table.add_row(f"{rows:,}", f"{resident:,.0f} MB")
        table.add_row("written", f"{one['resident_mb_at_the_end']:,.0f} MB")
        Console().print(table)


if __name__ == "__main__":
    main()
