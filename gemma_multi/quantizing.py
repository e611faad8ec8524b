"""`quantize`: a model to the int4 directory that mlx-lm and every engine here load as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_multi.calibration import SELF, check_source
from gemma_multi.calibration import calibrate as round_by_use
from gemma_multi.errors import OptionError
from gemma_multi.exporters import save
from gemma_multi.files import check_output
from gemma_multi.progress import Progress, reporting
from gemma_multi.sources import Source, open_checkpoint
from gemma_multi.training.recovery import Recoverer
from gemma_multi.transforms import QuantizationReport, quantize_checkpoint, rescaled


def quantize(
    model: Source,
    output: str | Path,
    *,
    bits: int = 4,
    embedding_bits: int = 4,
    calibrate: Any = "auto",
    recover: Any = None,
    revision: str | None = None,
    local_files_only: bool = False,
    progress: Progress = True,
    **options: Any,
) -> QuantizationReport:
    """Writes `model` on the portable grid, and in its config the scale at which its residual stream
    fits into float16.

    model, revision, local_files_only: what to quantise; see `open_checkpoint`.
    output: a new directory.
    bits: of the linear layers, 4 or 8. embedding_bits: 8 keeps the embedding in int8, one scale
        per row.
    calibrate: the text by which int4 codes are chosen, so that answers change least: "self" for
        what the model writes itself, or rows as `finetune` takes them, those that it will see (some
        6,000 tokens of them, beside 4,000 of its own, so that rows in one language do not cost it
        the others);
        None rounds each weight to its nearest code, in seconds and with a far larger loss. "auto"
        is "self" for `bits=4`.
    recover: rows, or "self", on which the int4 model is trained on top of that to say what the
        unquantised one says: its scales and norms learn, its codes stay. `options` are
        `finetune`'s then, and for "self" `texts`: how many the model writes, 128 where it is not
        said. A run that was stopped goes on from `output`-recovery, after calibration and text were
        made again.
    progress: True for a bar on a terminal, False for none, or a function of (done, total).

    Raises OptionError for bits outside the format and for too little memory, CheckpointError for a
    checkpoint that is int4 already or computes no numbers, DataError for rows that are bad or too
    few; then nothing is written.
    """
    output = Path(output)
    check_output(output, directory=True)
    if recover is None and options:
        raise OptionError(f"option {sorted(options)[0]!r} is for recover=..., which is not given")
    if recover is not None and bits != 4:
        raise OptionError(f"recover is for int4, received bits {bits}")
    if calibrate == "auto":
        calibrate = SELF if bits == 4 else None
    if calibrate is not None:
        check_source("calibrate", calibrate)
        if bits != 4:
            raise OptionError(f"calibrate is for int4, received bits {bits}")
    checkpoint = open_checkpoint(
        model, revision=revision, local_files_only=local_files_only, progress=progress is True
    )
    recoverer = None
    if recover is not None:
        work = output.with_name(f"{output.name}-recovery")
        recoverer = Recoverer.checked(checkpoint, recover, work, **options)
    if calibrate is not None:
        with reporting(progress, "calibrating") as report:
            quantized, found = round_by_use(checkpoint, calibrate, embedding_bits, report)
    else:
        with reporting(progress, "quantising") as report:
            quantized, found = quantize_checkpoint(checkpoint, bits, embedding_bits, report)
        quantized = rescaled(quantized)
    recovery = None
    if recoverer is not None:
        quantized, recovery = recoverer.recover(quantized, progress)
    save(quantized, output)
    if recoverer is not None:
        shutil.rmtree(recoverer.work)
    return replace(found, path=output, nbytes=quantized.nbytes, recovery=recovery)
