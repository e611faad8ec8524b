"""The calibrated int4 of a base: what "scales" trains, where it is given the original.

It is made from nothing but the model, so every specialist of one base begins from the same codes,
and it is made once: some four minutes for Gemma 3 270M, kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gemma_multi import formats
from gemma_multi.cache import CALIBRATED, trim, writable_cache
from gemma_multi.calibration import SELF, calibrate
from gemma_multi.checkpoint import Checkpoint
from gemma_multi.errors import GemmaError
from gemma_multi.exporters import save
from gemma_multi.progress import Progress, reporting

_RECIPE = 3  # counts up where calibration changes what it gives


def calibrated(base: Checkpoint, progress: Progress) -> Checkpoint:
    """`base` in int4, calibrated on what it writes itself."""
    cache = writable_cache(CALIBRATED)
    kept = cache / f"{_name(base)}-{_RECIPE}" if cache else None
    if kept is not None and (found := _read(base, kept)):
        return found
    with reporting(progress, "calibrating") as report:
        made, _ = calibrate(base, SELF, progress=report)
    if kept is not None:
        trim()
        with suppress(GemmaError, OSError):  # the disk is full, or another process was sooner
            save(made, kept)
        return _read(base, kept) or made
    return made


def _name(base: Checkpoint) -> str:
    """Of all that the text depends on which a model writes, and so its calibration."""
    config = json.dumps(base.config.to_dict(), sort_keys=True).encode()
    parts = (base.digest().encode(), config, base.tokenizer.model)
    digests = (hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _read(base: Checkpoint, kept: Path) -> Checkpoint | None:
    """`base` with the tensors that are kept; None where there are none, or half of them."""
    if not kept.exists():
        return None
    found = None
    with suppress(GemmaError, OSError):
        found = formats.read(kept)
    if found is None or not found.provenance.channels:
        shutil.rmtree(kept, ignore_errors=True)
        return None
    made = base.with_tensors(found.tensors, found.provenance.modifications[-1])
    config = base.config.replace(residual_scale=found.config.residual_scale)
    provenance = replace(made.provenance, channels=found.provenance.channels)
    return made.replace(config=config, provenance=provenance)
