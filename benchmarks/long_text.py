"""Long real text on the real Gemma 3 270M: perplexity by position, on each engine and transformers.

    python benchmarks/long_text.py [--tokens 8000] [--backends keras litert] [--json results/...]

The text is the Brown corpus's novels, one document after the other, read in parts as a long
conversation would be, far past the sliding window of 512. All compute in float32 from the same
weights, so every token's probability should be transformers' own: the largest difference is shown.
Each engine runs in a process of its own; its peak memory is that process's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from rich.table import Table

import gemma_multi
from gemma_multi.engines import ALL

_PART = 256  # tokens read at a time
_ENDS = (512, 2048, 4096, 8192, 16384, 32768)  # of stretches that are reported
_FIRST_NOVEL = 374  # of Brown's 500 documents: general fiction begins there
PEER = "transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--backends", nargs="+", default=["keras", "litert"])
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--alone", metavar="ENGINE FILE", nargs=2, help="what this script starts")
    options = parser.parse_args()
    ids = text(options.tokens)
    if options.alone:
        _measure(options.alone[0], ids, Path(options.alone[1]))
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for engine in (PEER, *options.backends):
            file = Path(work, f"{engine}.npz")
            command = [sys.executable, __file__, "--tokens", str(options.tokens)]
            subprocess.run([*command, "--alone", engine, str(file)], check=True)
            found[engine] = dict(np.load(file))
    rows = [summary(engine, one, found[PEER]["logs"]) for engine, one in found.items()]
    _show(rows, len(ids))
    if options.json:
        options.json.write_text(json.dumps({"tokens": len(ids), "rows": rows}, indent=1) + "\n")


def text(count: int) -> np.ndarray:
    tokenizer = gemma_multi.open_checkpoint(gemma_270m()).tokenizer
    ids = [tokenizer.bos_id]
    for document in brown_documents()[_FIRST_NOVEL:]:
        ids += tokenizer.encode(document + "\n\n")
        if len(ids) >= count:
            break
    return np.array(ids[:count], np.int32)


def _measure(engine: str, ids: np.ndarray, output: Path) -> None:
    """Writes each token's log-probability, the seconds it took, and the peak memory."""
    model = gemma_multi.load(gemma_270m(), backend=engine, precision="float32",
                             context_length=1 << (len(ids) - 1).bit_length())  # fmt: skip
    model.engine.session().read(ids[:_PART], ALL)  # compiled
    session = model.engine.session()
    begin, logs = time.perf_counter(), []
    for start, part in _parts(ids):
        logits = np.asarray(session.read(part, ALL), np.float32)
        following = ids[start + 1 : start + 1 + len(part)]
        logits = logits[: len(following)]
        largest = logits.max(-1)
        total = largest + np.log(np.exp(logits - largest[:, None]).sum(-1))
        logs.append(logits[np.arange(len(following)), following] - total)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    np.savez(output, logs=np.concatenate(logs), seconds=seconds, peak=peak)


def _parts(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(ids), _PART):
        yield start, ids[start : start + _PART]


def summary(engine: str, found: dict[str, np.ndarray], expected: np.ndarray) -> dict[str, object]:
    logs, stretches, start = found["logs"], {}, 0
    for end in _ENDS:
        if start < len(logs):
            stretches[f"{start}-{min(end, len(logs))}"] = float(np.exp(-logs[start:end].mean()))
        start = end
    return {
        "engine": engine,
        "perplexity": stretches,
        "largest_difference": float(np.abs(logs - expected).max()),
        "tokens_per_second": len(logs) / float(found["seconds"]),
        "peak_gb": float(found["peak"]) / 1e9,
    }


def _show(rows: list[dict[str, object]], tokens: int) -> None:
    table = Table(title=f"{tokens:,} tokens: perplexity by position")
    table.add_column("")
    for row in rows:
        table.add_column(str(row["engine"]), justify="right")
    stretches = [row["perplexity"] for row in rows]
    for stretch in stretches[0]:  # type: ignore[attr-defined]
        table.add_row(stretch, *(f"{one[stretch]:.3f}" for one in stretches))  # type: ignore[index]
    table.add_section()
    for name, key, form in (
        ("largest difference", "largest_difference", ".1e"),
        ("tokens/s", "tokens_per_second", ".0f"),
        ("GB", "peak_gb", ".1f"),
    ):  # fmt: skip
        table.add_row(name, *(format(row[key], form) for row in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
