"""Rows per second of `model.batch`, one at a time and many side by side.

    python benchmarks/batching.py [--backend keras] [--rows 32] [--width 32] [--ahead 16]
        [--json results.json]

The real Gemma 3 270M as it came, in float32, on rows of unequal lengths (beginnings of the Brown
corpus, 8 to 40 words): a text of 32 tokens for each, and a label of eight by an instruction that
all share. The same rows go through `width=1`, which reads one after another, and through
`width=32`; the two take turns, and all is compiled before anything counts. Whether the greedy texts
are the same is printed beside it. `--ahead 1` has the host choose every token, as on a CPU; without
it the backend does what it does on this device.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from other_peoples_files import brown_documents, gemma_270m
from rich.console import Console
from rich.table import Table
from side_by_side import seconds

import gemma_multi

LABELS = "news reviews religion hobbies science fiction romance humour".split()
TOKENS = 32  # of a text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="keras")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--ahead", type=int, help="tokens chosen on the device at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = gemma_multi.load(
        gemma_270m(), backend=options.backend, precision="float32", context_length=512
    )
    if options.ahead is not None:
        model.engine.steps_ahead = options.ahead
    rows = texts(options.rows)
    found: dict[str, Any] = {
        "device": model.engine.device, "gpu": model.engine.gpu, "ahead": model.engine.steps_ahead
    }  # fmt: skip
    for task, given in (
        ("generate", {"raw": True, "temperature": 0, "max_tokens": TOKENS}),
        ("classify", {"raw": True, "labels": LABELS}),
    ):
        result = compared(model, rows, task, given, options.width, options.rounds)
        found[task] = result
    table = Table()
    for heading in ("task", "one at a time", f"{options.width} side by side", "ratio", "same"):
        table.add_column(heading, justify="right")
    for task in ("generate", "classify"):
        one = found[task]
        table.add_row(
            task, f"{one['alone']:.1f} rows/s", f"{one['together']:.1f} rows/s",
            f"{one['together'] / one['alone']:.2f}", f"{one['same']:.0%}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def texts(count: int) -> list[str]:
    """Beginnings of 8 to 40 words."""
    found = []
    for i, document in enumerate(brown_documents()[:count]):
        found.append(" ".join(document.split()[: 8 + i * 7 % 33]))
    return found


def compared(
    model: gemma_multi.Model, rows: list[str], task: str, given: dict[str, Any], width: int,
    rounds: int,
) -> dict[str, float]:  # fmt: skip
    """Rows per second both ways, and the share of rows with the same outcome."""

    told: dict[int, list[str]] = {}

    def run(width: int) -> None:
        done = model.batch(rows, task, width=width, progress=False, **given)
        told[width] = [str(row.value) for row in done]

    alone, together = seconds(lambda: run(1), lambda: run(width), runs=rounds)
    same = [a == b for a, b in zip(told[1], told[width], strict=True)]
    return {
        "alone": len(rows) / alone, "together": len(rows) / together, "same": sum(same) / len(same)
    }  # fmt: skip


if __name__ == "__main__":
    main()
