"""Training the real Gemma 3 270M in float16, beside float32 and bfloat16: the loss of twenty steps.

    python benchmarks/float16_training.py [--method scales full] [--json benchmarks/results/...]

The same forty film reviews in the same order, two to a step, a loss on every token. Weights and
optimiser are float32 always; what is in float16 are activations and their gradients, the residual
stream at the scale that the model's own activations choose. Adam makes a step of the same size of
a gradient that is nearly nothing, so what is rounded differently comes back larger in later steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from other_peoples_files import gemma_270m
from real_rows import film_reviews
from rich.console import Console
from side_by_side import columns

import gemma_multi

ROWS, BATCH = 40, 2
DTYPES = ("float32", "float16", "bfloat16")
METHODS: dict[str, dict[str, Any]] = {
    "scales": {"method": "scales"},  # of the calibrated int4 model
    "full": {"method": "full", "qat": False},
}
Losses = dict[str, list[float]]  # by the type of activations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--backend", default="keras")
    parser.add_argument("--json", type=Path, help="write the losses here as well")
    options = parser.parse_args()
    found = {method: losses(METHODS[method], options.backend) for method in options.method}
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def losses(method: dict[str, Any], backend: str) -> Losses:
    """Of each step."""
    rows, found = film_reviews()[:ROWS], {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as work:
            run = gemma_multi.finetune(
                gemma_270m(), rows, Path(work, "run"), backend=backend, dtype=dtype, validation=0,
                batch_size=BATCH, epochs=1, loss_on="all", **method,
            )  # fmt: skip
            found[dtype] = [step["loss"] for step in run.history if "loss" in step]
    return found


def show(found: dict[str, Losses]) -> None:
    table = columns(
        ("what is trained", "activations"),
        ("first loss", "last", "largest difference from float32", "mean"),
    )
    for method, by_type in found.items():
        for dtype, seen in by_type.items():
            apart = [abs(a - b) for a, b in zip(seen, by_type["float32"], strict=True)]
            worst, mean = f"{max(apart):.3f}", f"{sum(apart) / len(apart):.3f}"
            table.add_row(method, dtype, f"{seen[0]:.3f}", f"{seen[-1]:.3f}", worst, mean)
    Console().print(table)


if __name__ == "__main__":
    main()
