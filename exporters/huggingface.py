"""A Hugging Face directory: dense safetensors that transformers, mlx-lm and this package load.

Programs load weights in the type that config.json states, so it states what is stored; the type
that the model was trained in, which decides its embedding scale, is an entry of our own beside it.
`write_directory` serves `exporters.mlx` as well, whose directory is the same with packed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.config import TRAINED_DTYPE
from gemma_multi.errors import CheckpointError, TokenizerError
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.companions import (
    write_account,
    write_generation_config,
    write_tokenizer_json,
)
from gemma_multi.files import new_directory, write_json
from gemma_multi.formats.directory import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.safetensors_file import write_safetensors
from gemma_multi.transforms import DENSE, to_precision, without_sfp8


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
    stored, trained = checkpoint.precision, checkpoint.config.dtype
    config = {}
    if stored in DENSE and stored != trained:
        config = {"dtype": stored, "torch_dtype": stored, TRAINED_DTYPE: trained}
    return write_directory(checkpoint, flat, config, output, EXPORTER.format, "transformers")


def write_directory(
    checkpoint: Checkpoint, flat: Mapping[str, np.ndarray], config: Mapping[str, Any],
    output: Path, format_name: str, library: str,
) -> ExportReport:  # fmt: skip
    """`flat` are the tensors as they are stored, `config` what config.json says besides the
    model, `library` whose the directory is. Raises OSError; then nothing is left."""
    with new_directory(output) as temporary:
        contiguous = {name: np.ascontiguousarray(array) for name, array in flat.items()}
        write_safetensors(contiguous, temporary / WEIGHTS_FILE, {"format": "mlx"})
        write_json(temporary / CONFIG_FILE, {**checkpoint.config.to_dict(), **config})
        write_generation_config(checkpoint, temporary)
        (temporary / TOKENIZER_FILE).write_bytes(checkpoint.tokenizer.model)
        with suppress(TokenizerError):  # of no such form: no loss to what reads tokenizer.model
            write_tokenizer_json(checkpoint, temporary, checkpoint.context_length)
        template = checkpoint.path / CHAT_TEMPLATE_FILE if checkpoint.path is not None else None
        if template is not None and template.is_file():
            (temporary / CHAT_TEMPLATE_FILE).write_bytes(template.read_bytes())
        write_account(checkpoint, checkpoint.provenance, temporary, library, checkpoint.precision)
    size = sum(file.stat().st_size for file in output.iterdir())
    return ExportReport(output, size, format_name, checkpoint.precision, checkpoint.context_length)


EXPORTER = Exporter(format="huggingface", options=HuggingFaceOptions, write=_write)
