"""An export, read by who it is for: a short text's logits against those of its weights.

Design choices:
- What is expected is computed in NumPy from the file as this package reads it back (where it reads
  none, from the checkpoint that was written), so that rounding, which the exporter reports, is not
  held against the file; what is wrong with its layout, config or arithmetic is.
- On by itself where it takes less than `LONGEST` seconds by the size of the file and what is known
  of the program; beyond, the report says that it was not done and how to have it.
- A file that fails is left where it is, to be looked at: the program may be at fault, or not be
  whole, and an export may have taken long. The error names it.
- `GEMMA_MULTI_VERIFY=0` turns it off where nobody says otherwise, for scripts that write many.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np

from gemma_multi import formats
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.consumers import CONSUMERS, Consumer, ConsumerError, consumer, logits_in
from gemma_multi.decoder import Decoder, Weights, log_softmax
from gemma_multi.errors import OptionError, VerificationError
from gemma_multi.exporters.base import ExportReport, Verification
from gemma_multi.transforms import GRIDS, to_precision

LONGEST = 10  # seconds, unless it is asked for
_ROWS = 32  # positions compared at a time
TEXT = "The quick brown fox jumps over the lazy dog."


def check_verifiable(format: str, asked: bool | None) -> None:
    """Raises OptionError, before anything is written, where what is asked for cannot be had."""
    if asked and consumer(format) is None:
        names = " or ".join(one.name for one in CONSUMERS if one.format == format)
        raise OptionError(
            f"verify is on, but {names or 'no Python package'} is there to read {format}; "
            f"{f'install {names}, or ' if names else ''}leave it off"
        )


def verify(report: ExportReport, checkpoint: Checkpoint, asked: bool | None) -> Verification | None:
    """What a program makes of an export of `checkpoint`; None where nobody wants to know.

    `asked`: whether it must be; None: where it is quick. Raises VerificationError where the program
    does not read the file or computes something else.
    """
    if asked is False or (asked is None and os.environ.get("GEMMA_MULTI_VERIFY") == "0"):
        return None
    one = consumer(report.format)
    if one is None:
        return Verification(why_not="no program that reads it is installed")
    seconds = one.seconds + one.seconds_per_gigabyte * report.nbytes / 1e9
    if asked is None and seconds > LONGEST:
        return Verification(
            why_not=f"{one.name} would take about {seconds:.0f} s; --verify asks it"
        )
    return _compare(one, report, checkpoint)


def _compare(one: Consumer, report: ExportReport, checkpoint: Checkpoint) -> Verification:
    tokenizer = checkpoint.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)][: report.context_length]
    try:
        theirs = logits_in(one, report.path, ids)
    except ConsumerError as error:
        raise VerificationError(
            f"{report.path}: {one.name} does not read it: {error}. The file is left as it was "
            "written; --no-verify skips this"
        ) from error
    difference, divergence = compared(expected(one, _written(report, checkpoint), ids), theirs)
    if not divergence <= one.tolerance:  # NaN as well
        raise VerificationError(
            f"{report.path}: {one.name} computes something else from it, {divergence:.2g} nats a "
            f"token away where {one.tolerance:g} are usual. The file is left as it was written; "
            "please report this, with the command and both versions"
        )
    return Verification(one.name, len(ids), difference, divergence)


def expected(one: Consumer, checkpoint: Checkpoint, ids: Sequence[int]) -> np.ndarray:
    """The logits `f32[T, V]` that a program should find."""
    config = checkpoint.config
    if not one.rounds_scale and config.is_scaled_by_root:
        config = config.replace(embedding_scale=config.hidden_size**0.5)
    return Decoder(config, Weights(checkpoint)).logits(np.array(ids))


def _written(report: ExportReport, checkpoint: Checkpoint) -> Checkpoint:
    """The weights that an export should hold."""
    if formats.formats()[report.format].is_model:
        return formats.read(report.path)
    if report.precision not in GRIDS:
        return checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once, when it was written
        return to_precision(checkpoint, report.precision)


def compared(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(largest difference, nats a token) of logits `[T, V]`."""
    if ours.shape != theirs.shape:
        return float("inf"), float("inf")
    difference, divergence = 0.0, 0.0
    for start in range(0, len(ours), _ROWS):
        one, other = (x[start : start + _ROWS].astype(np.float64) for x in (ours, theirs))
        difference = float(np.maximum(difference, np.abs(one - other).max()))  # NaN stays
        p, q = log_softmax(one), log_softmax(other)
        divergence += float((np.exp(p) * (p - q)).sum()) / len(ours)
    return difference, 0.0 if divergence < 0 else divergence  # likewise
