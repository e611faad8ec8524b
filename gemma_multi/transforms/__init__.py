"""Transforms: a Checkpoint in, another one out. To a precision, and with an adapter merged."""

from gemma_multi.transforms.merge import cast_to_stored, merge
from gemma_multi.transforms.precision import (
    original,
    quantize_checkpoint,
    tensor_error,
    to_precision,
)
from gemma_multi.transforms.report import (
    Calibration,
    Closeness,
    QuantizationReport,
    Recovery,
    TensorError,
)

__all__ = [
    "Calibration",
    "Closeness",
    "QuantizationReport",
    "Recovery",
    "TensorError",
    "cast_to_stored",
    "merge",
    "original",
    "quantize_checkpoint",
    "tensor_error",
    "to_precision",
]
