"""mlx-lm's directory: the int4 or int8 weights as they are, or dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_multi.checkpoint import Checkpoint
from gemma_multi.exporters.base import Exporter, ExportReport
from gemma_multi.exporters.huggingface import write_directory
from gemma_multi.formats.mlx import QUANTIZATION, quantization_entry
from gemma_multi.options import option
from gemma_multi.progress import Report
from gemma_multi.quantization.tensor import QuantizedTensor
from gemma_multi.transforms import to_precision, without_sfp8


@dataclass(frozen=True)
class MlxOptions:
    precision: str = option("auto", "int4, int8, bfloat16, float16, float32, or auto: as stored.")


def _write(
    checkpoint: Checkpoint, output: Path, options: MlxOptions, progress: Report
) -> ExportReport:
    checkpoint = without_sfp8(checkpoint, options.precision)
    checkpoint = to_precision(checkpoint, options.precision, progress)
    flat: dict[str, np.ndarray] = {}
    quantized: dict[str, QuantizedTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            stem = name.removesuffix(".weight")
            quantized[stem] = tensor
            flat[name] = tensor.packed
            flat[f"{stem}.scales"], flat[f"{stem}.biases"] = tensor.scales, tensor.biases
        else:
            flat[name] = checkpoint.weight(name)
    config = {QUANTIZATION: quantization_entry(quantized)} if quantized else {}
    return write_directory(checkpoint, flat, config, output, EXPORTER.format, "mlx")


EXPORTER = Exporter(format="mlx", options=MlxOptions, write=_write)
