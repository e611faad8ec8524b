"""A Hugging Face directory: dense safetensors that transformers, mlx-lm and this package load.

`write_directory` serves `exporters.mlx` as well, whose directory is the same with packed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.checkpoint.provenance import NOTICE_FILE, PROVENANCE_FILE
from gemma_multi.errors import CheckpointError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.files import new_directory, write_json
from gemma_multi.formats.directory import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_COMPANIONS,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.safetensors_file import write_safetensors
from gemma_multi.transforms import to_precision, without_sfp8


@dataclass(frozen=True)
class HuggingFaceOptions:
    precision: str = option(
        "auto",
        "float32, bfloat16 or float16, or auto: as stored. From int4 it is exact in float32.",
    )


def _write(
    checkpoint: Checkpoint, output: Path, options: HuggingFaceOptions, progress: Report
) -> ExportReport:
    checkpoint = without_sfp8(checkpoint, options.precision)
    checkpoint = to_precision(checkpoint, options.precision, progress)
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"the checkpoint is stored as {checkpoint.precision}, which a Hugging Face directory "
            "does not hold; give format='mlx', or precision='float32'"
        )
    flat = {name: np.asarray(checkpoint.weight(name)) for name in checkpoint.tensors}
    return write_directory(checkpoint, flat, {}, output, EXPORTER.format)


def write_directory(
    checkpoint: Checkpoint, flat: Mapping[str, np.ndarray], config: Mapping[str, Any],
    output: Path, format_name: str,
) -> ExportReport:  # fmt: skip
    """`flat` are the tensors as they are stored, `config` what config.json says besides the
    model. Raises OSError; then nothing is left."""
    with new_directory(output) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in flat.items()}
        write_safetensors(contiguous, temporary / WEIGHTS_FILE, {"format": "mlx"})
        write_json(temporary / CONFIG_FILE, {**checkpoint.config.to_dict(), **config})
        write_json(temporary / GENERATION_FILE, dict(checkpoint.generation))
        (temporary / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer.model)
        for name in TOKENIZER_COMPANIONS:
            if checkpoint.path is not None and (checkpoint.path / name).is_file():
                (temporary / name).write_bytes((checkpoint.path / name).read_bytes())
        provenance = checkpoint.provenance
        (temporary / PROVENANCE_FILE).write_bytes(provenance.to_json())
        (temporary / NOTICE_FILE).write_text(provenance.notice(), encoding="utf-8")
    size = sum(file.stat().st_size for file in output.iterdir())
    return ExportReport(output, size, format_name, checkpoint.precision, checkpoint.context_length)


EXPORTER = Exporter(format="huggingface", options=HuggingFaceOptions, write=_write)
