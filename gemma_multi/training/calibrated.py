"""The calibrated int4 of a base: what "scales" trains, where it is given the original.

It is made from nothing but the model, so every specialist of one base begins from the same codes,
and it is made once: four minutes for Gemma 3 270M, kept in the user's cache.
"""

from __future__ import annotations

from collections import deque

from gemma_multi import formats
from gemma_multi.cache import CALIBRATED, writable_cache
from gemma_multi.calibration import SELF, calibrate
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import OptionError
from gemma_multi.exporters import save
from gemma_multi.progress import Progress, reporting
from gemma_multi.rows import Data, read_rows

_RECIPE = 1  # counts up where calibration changes what it gives


def check_rows(data: Data) -> None:
    """Reads all rows, before something that takes minutes. Raises DataError for a bad one."""
    deque(read_rows(data), maxlen=0)


def calibrated(base: Checkpoint, progress: Progress) -> Checkpoint:
    """`base` in int4, calibrated on what it writes itself."""
    cache = writable_cache(CALIBRATED)
    kept = cache / f"{base.digest()[:32]}-{_RECIPE}" if cache else None
    if kept is not None and kept.exists():
        return formats.read(kept)
    with reporting(progress, "calibrating") as report:
        made, _ = calibrate(base, SELF, progress=report)
    if kept is None:
        return made
    try:
        save(made, kept)
    except (OptionError, OSError):
        if not kept.exists():  # else somebody else was sooner
            raise
    return formats.read(kept)
