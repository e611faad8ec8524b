"""What an engine holds a checkpoint's weights in, and what it computes in: one rule for engines
that have a choice.

- A dense precision is both. Quantised weights and SFP8 are computed with in the type that the
  device is fast at, and so is what is stored in no particular one.
- float16 has eight times the precision of bfloat16, and codes times scales of our int4 grid are
  exact in it; what it lacks is room. A model is run in it with its residual stream at a scale that
  fits (`transforms.fit_float16`), or not at all.
"""

from __future__ import annotations

from typing import NamedTuple

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.engines.backend import Request
from gemma_multi.quantization.tensor import SFP8
from gemma_multi.transforms import DENSE, GRIDS, fit_float16, to_precision


class Prepared(NamedTuple):
    """A checkpoint as it will be run."""

    checkpoint: Checkpoint
    precision: str  # of the weights
    compute: str  # of the activations


def prepare(checkpoint: Checkpoint, request: Request, fast: str) -> Prepared:
    """`fast` is the type that the device is fast at. Raises CheckpointError for what cannot go on
    the grid that was asked for, or computes numbers beyond float16."""
    precision = request.precision
    if precision in GRIDS or precision == SFP8:
        checkpoint = to_precision(checkpoint, precision, request.progress)
    elif precision == "auto":
        precision = checkpoint.precision if checkpoint.is_packed else fast
    compute = precision if precision in DENSE else fast
    if compute == "float16":
        checkpoint = fit_float16(checkpoint)
    return Prepared(checkpoint, precision, compute)
