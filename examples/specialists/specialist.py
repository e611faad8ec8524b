"""What the six examples share: the options, training, and a score before and after.

Each of them has rows to learn from and rows that the model never sees, trains `storyteller` (or
`--model google/gemma-3-270m`) through the int4 grid, and asks the unseen rows before and after.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import track

import gemma_multi

Row = dict[str, str]
Judge = Callable[[Row, str], bool]


def exactly(row: Row, answer: str) -> bool:
    return answer.strip() == row["completion"]


def split(
    draw: Callable[[random.Random], Row], train: int, test: int
) -> tuple[list[Row], list[Row]]:
    """So many different rows of each kind: none is in both."""
    rng, rows = random.Random(0), dict[str, Row]()
    while len(rows) < train + test:
        row = draw(rng)
        rows.setdefault(row["prompt"], row)
    drawn = list(rows.values())
    return drawn[:train], drawn[train:]


def run(
    name: str, train: list[Row], test: list[Row], judge: Judge = exactly, epochs: int = 8
) -> None:
    """Trains on `train`, and prints the share of `test` answered right before and after."""
    parser = argparse.ArgumentParser(description=f"Train a specialist: {name}.")
    parser.add_argument("--model", default="storyteller")
    parser.add_argument("--backend", default="auto", help="keras, mlx or auto")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--output", type=Path, help="keep the model, its history and curves here")
    options = parser.parse_args()
    small = options.model == "storyteller"  # 77 times smaller than Gemma, it takes larger steps
    rate = options.learning_rate or (2e-3 if small else None)

    console = Console()
    before = gemma_multi.load(options.model)
    score = _score(before, test, judge)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        result = gemma_multi.finetune(
            options.model, train, output=options.output or Path(work, "run"), validation=0.1,
            backend=options.backend, epochs=options.epochs, learning_rate=rate,
            batch_size=16, schedule="cosine", warmup=0.1, max_length=256,
        )  # fmt: skip
        seconds = time.monotonic() - started
        after = _score(result.model, test, judge)
        shown = test[0]
        console.print(f"\n[dim]{shown['prompt']}[/dim]")
        for when, model in (("before", before), ("after", result.model)):
            answer = model.generate(shown["prompt"], temperature=0.0, max_tokens=80).text
            console.print(f"[bold]{when:>6}[/bold]  {answer.strip()}", highlight=False)
    console.print(
        f"\n{name}: {score:.0%} of {len(test)} unseen rows right before, {after:.0%} after "
        f"{seconds:.0f} s of training on {len(train)} rows, in int4",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _score(model: gemma_multi.Model, rows: list[Row], judge: Judge) -> float:
    right = sum(
        judge(row, model.generate(row["prompt"], temperature=0.0, max_tokens=80).text)
        for row in track(rows, "asking", transient=True)
    )
    return right / len(rows)
