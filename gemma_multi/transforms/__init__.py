"""Transforms: a Checkpoint in, another one out. To a precision, and with an adapter merged."""

from gemma_multi.transforms.merge import cast_to_stored, merge
from gemma_multi.transforms.precision import (
    QuantizationReport,
    Recovery,
    TensorError,
    original,
    quantization_errors,
    quantize_checkpoint,
    to_precision,
)

__all__ = [
    "QuantizationReport",
    "Recovery",
    "TensorError",
    "cast_to_stored",
    "merge",
    "original",
    "quantization_errors",
    "quantize_checkpoint",
    "to_precision",
]
